"""What a benchmark leaves: its raw figures with what they were measured on, and its page, where it has one."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from runs.directory import write_json

PAGES, RESULTS = Path("docs"), Path("benchmarks/results")
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


def add_out(parser: argparse.ArgumentParser) -> None:
    """Adds ``--out`` to a script that writes a page."""
    parser.add_argument("--out", type=Path, help=f"folder of the page and of its raw figures (default: {PAGES} and {RESULTS})")


def write_page(name: str, out: Path | None, text: str, figures: Mapping[str, Any], plot: Figure | None = None) -> None:
    """Writes ``name``.md and its plot, and the raw figures as ``name``.json, all below ``out`` where it is given."""
    pages = out or PAGES
    pages.mkdir(parents=True, exist_ok=True)
    (pages / f"{name}.md").write_text(text)
    if plot:
        (pages / "images").mkdir(exist_ok=True)
        plot.savefig(pages / "images" / f"{name}.png")
    write_record((out or RESULTS) / f"{name}.json", figures)
