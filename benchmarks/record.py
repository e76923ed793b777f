"""What a benchmark leaves: its raw figures with what they were measured on."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from runs.directory import write_json

RESULTS = Path("benchmarks/results")
PACKAGES = (
    "torch", "torchvision", "lightning", "numpy", "wandb", "hydra-core", "diffusers", "denoising-diffusion-pytorch", "pythae",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """Returns what the figures depend on."""
    model = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {"processor": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "versions": versions}


def write_record(path: Path, figures: Mapping[str, Any]) -> None:
    """Writes figures below the date and the machine that they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "machine": machine(), **figures})
