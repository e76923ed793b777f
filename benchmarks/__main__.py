"""Everything that has a target, in one table: ``python -m benchmarks [--only NAME ...]``; ``--list`` names the parts."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import loops, unets
from benchmarks.paired import Row, table
from benchmarks.pipeline import pipeline
from benchmarks.pythae_trainer import pythae
from benchmarks.startup import startup
from benchmarks.training import bf16, memory, unet_step, vae_step
from runs.directory import write_json

PACKAGES = ("torch", "torchvision", "lightning", "wandb", "hydra-core", "diffusers", "denoising-diffusion-pytorch", "pythae")


def benches(checkout: Path | None) -> dict[str, Callable[[int], list[Row]]]:
    """Returns every part by name: rounds -> rows."""
    return {
        "vae-step": vae_step,
        "unet-step": unet_step,
        "pipeline": pipeline,
        **unets.benches(checkout),
        "pythae": pythae,
        "bf16": bf16,
        "memory": memory,
        "startup": startup,
        **loops.benches(checkout),
    }


def machine() -> dict[str, Any]:
    """Returns what the figures depend on."""
    model = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {"processor": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "versions": versions}


def _heading(machine: dict[str, Any]) -> list[str]:
    """Returns what stands above the table in its file."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return [
        "Medians of pairs measured in turns by `python -m benchmarks`, each row's number of them in its column; ratios are",
        f"ours/theirs where small is good, and theirs/ours where large is. {machine['processor']}, {machine['cores']} cores, "
        f"{machine['threads']} threads; {versions}.",
        "",
    ]


def run(parts: dict[str, Callable[[int], list[Row]]], rounds: int) -> tuple[list[Row], dict[str, str]]:
    """Returns the rows of all parts, and why some have none."""
    rows, missing = [], {}
    for number, (name, part) in enumerate(parts.items(), start=1):
        print(f"[{number}/{len(parts)}] {name}", flush=True)
        start = time.monotonic()
        try:
            found = part(rounds)
        except ModuleNotFoundError as error:
            missing[name] = f"{error}; peers: pip install -e '.[bench]'" if error.name else str(error)
            print(f"  left out: {missing[name]}", flush=True)
            continue
        rows += found
        for row in found:
            print(f"  {row.ratio:.3g} against {row.against}  ({time.monotonic() - start:.0f} s)", flush=True)
    return rows, missing


def main() -> None:
    """Runs the parts, prints the table and writes it with what it was measured on."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these parts")
    parser.add_argument("--list", action="store_true", help="names the parts and ends")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of each comparison, or more; the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--improved-diffusion", type=Path, metavar="DIR", help="checkout of openai/improved-diffusion")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    settings = parser.parse_args()
    parts = benches(settings.improved_diffusion)
    if settings.list:
        print("\n".join(parts))
        return
    unknown = [name for name in settings.only or () if name not in parts]
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: choose among {', '.join(parts)}")
    torch.set_num_threads(settings.threads)
    chosen = {name: parts[name] for name in settings.only or parts}
    rows, missing = run(chosen, settings.rounds)
    text = table(rows)
    print("\n".join(["", *text]))
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}.json"
    record = {"machine": machine(), "rounds": settings.rounds, "rows": [row.record() for row in rows], "left_out": missing}
    write_json(path, json.loads(json.dumps(record)))
    path.with_suffix(".md").write_text("\n".join([*_heading(record["machine"]), *text, ""]))
    print(f"wrote {path} and .md")


if __name__ == "__main__":
    main()
