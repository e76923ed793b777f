"""Everything that has a target, in one table: ``python -m benchmarks [--only NAME ...]``; ``--list`` names the parts."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import loops, unets
from benchmarks.paired import Row, table
from benchmarks.pipeline import pipeline
from benchmarks.pythae_trainer import pythae
from benchmarks.record import RESULTS, machine, write_record
from benchmarks.startup import startup
from benchmarks.training import bf16, memory, unet_step, vae_step

CHECKOUT = ("improved_diffusion/unet.py", "improved_diffusion/gaussian_diffusion.py")  # what is imported from there


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


def refuse_other_folders(checkout: Path) -> None:
    """Makes sure that the peer is where it is said to be.

    Raises:
        SystemExit: with a sentence, if it is not.
    """
    lacks = [name for name in CHECKOUT if not (checkout / name).is_file()]
    if lacks:
        raise SystemExit(
            f"--improved-diffusion={checkout} has no {' and no '.join(lacks)}: "
            "give the folder of a checkout of https://github.com/openai/improved-diffusion"
        )


def _heading(machine: dict[str, Any]) -> list[str]:
    """Returns what stands above the table in its file."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return [
        "Pairs measured in turns by `python -m benchmarks`, each row's number of them in its column. A ratio is the median of",
        "the pairs' ratios, which is not the ratio of the two medians beside it: ours/theirs where small is good, theirs/ours",
        f"where large is. {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads; {versions}.",
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
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    settings = parser.parse_args()
    parts = benches(settings.improved_diffusion)
    if settings.list:
        print("\n".join(parts))
        return
    unknown = [name for name in settings.only or () if name not in parts]
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: choose among {', '.join(parts)}")
    if settings.improved_diffusion:
        refuse_other_folders(settings.improved_diffusion)
    torch.set_num_threads(settings.threads)
    chosen = {name: parts[name] for name in settings.only or parts}
    rows, missing = run(chosen, settings.rounds)
    if not rows:
        raise SystemExit("nothing was measured, and nothing is written")
    text = table(rows)
    print("\n".join(["", *text]))
    path = settings.out / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}.json"
    write_record(path, {"rounds": settings.rounds, "rows": [row.record() for row in rows], "left_out": missing})
    path.with_suffix(".md").write_text("\n".join([*_heading(machine()), *text, ""]))
    print(f"wrote {path} and .md")


if __name__ == "__main__":
    main()
