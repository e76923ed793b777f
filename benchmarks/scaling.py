"""How time and memory of a step grow: ``python -m benchmarks.scaling`` writes docs/scaling.md, its plot and its raw figures.

The steps of one series take turns in one process; medians count. Memory is what must be held: parameters, gradients, the
optimiser's moments, and every tensor that autograd keeps for the backward pass, counted once each. Unlike a peak of resident
memory this is exact and the same on every run; what it leaves out (temporaries) is read off one peak beside it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import activations, ranks
from benchmarks.memory import STATUS, resident_peak
from benchmarks.paired import timed
from benchmarks.power_law import fit, fit_above
from benchmarks.record import add_out, write_page
from benchmarks.scaling_cases import Series, TrainingStep, all_series, ddpm
from benchmarks.scaling_page import PEAK_BATCH, Curve, document, plot


def measure(series: Series, rounds: int) -> Curve:
    """Times the steps of a series in turns, forwards and backwards."""
    torch.manual_seed(0)
    steps = {value: series.build(value) for value in series.values}
    for step in steps.values():
        step(), step()
    seconds: dict[int, list[float]] = {value: [] for value in steps}
    for turn in range(rounds):
        for value in sorted(steps, reverse=turn % 2 == 1):
            seconds[value].append(timed(steps[value]))
    return Curve(
        series.name,
        series.label,
        series.what,
        [series.abscissa(step, value) for value, step in steps.items()],
        [statistics.median(times) for times in seconds.values()],
        [step.memory() for step in steps.values() if isinstance(step, TrainingStep)],
    )


def measure_ranks(found: dict[str, list[float]]) -> Curve:
    """Returns the times of the same job on one process and on two; memory is what each of them holds for its rows."""
    what = "digits' U-Net, global batch 128, one thread a process"
    times = [statistics.median(found[name]) for name in ("one", "two")]
    return Curve("ranks", "processes (DDP, gloo)", what, [1, 2], times, [ranks.memory(devices) for devices in (1, 2)])


def peak(batch: int) -> tuple[float, float] | None:
    """Returns a training step's memory in MiB, as counted, and by how much it raised the peak of a process of its own."""
    if not STATUS.exists():
        return None
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", "--peak", str(batch)],
        cwd=ranks.ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    counted, risen = (float(word) for word in done.stdout.split()[-2:])
    return counted, risen


def _peak_here(batch: int) -> None:
    before = resident_peak()
    step = TrainingStep(ddpm(16), batch)
    step(), step()
    risen = resident_peak() - before
    print(step.memory() / 2**20, risen)


def raw(curve: Curve) -> dict[str, Any]:
    """Returns a series as plain values, with both fits to its seconds and to its bytes."""
    fits = {}
    for name, values in (("seconds", curve.seconds), ("memory", curve.memory)):
        if values:
            above = fit_above(curve.x, values)
            fits[name] = {"from_zero": asdict(fit(curve.x, values)), "above_fixed": asdict(above) if above else None}
    return {**asdict(curve), "fits": fits}


def main() -> None:
    """Measures, prints the page, and writes it with its plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="turns of each step; the median counts")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two values of each, one turn, no other processes: to see that it runs; written only where --out says",
    )
    add_out(parser)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)  # what a process of its own is asked for
    settings = parser.parse_args()
    if settings.peak:
        return _peak_here(settings.peak)
    curves = []
    for series in all_series(settings.quick):
        curves.append(measure(series, 1 if settings.quick else settings.rounds))
        print(f"{series.name} done", flush=True)
    processes = None if settings.quick else ranks.in_turns(settings.rounds, 40)
    if processes:
        curves.append(measure_ranks(processes))
    peaks = None if settings.quick else peak(PEAK_BATCH)
    smaller = ("model.network.base_channels=8",) if settings.quick else ()
    again = activations.measure(1 if settings.quick else settings.rounds, *smaller)
    text = document(curves, processes, peaks, again)
    figures = {"rounds": settings.rounds, "series": [raw(curve) for curve in curves], "ranks": processes}
    figures["checkpointed_activations"] = asdict(again)
    figures["peak_MiB"] = dict(zip(("counted", "resident"), peaks, strict=True)) if peaks else None
    if settings.out or not settings.quick:
        write_page("scaling", settings.out, text, figures, plot(curves))
    print(text)


if __name__ == "__main__":
    main()
