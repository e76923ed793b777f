"""The page and the plot of :mod:`benchmarks.scaling`."""

from __future__ import annotations

import math
import os
import platform
import statistics
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

from benchmarks.activations import Activations
from benchmarks.pages import bullet, paragraph
from benchmarks.power_law import fit, fit_above
from callbacks.pictures import BLUE, ORANGE

PEAK_BATCH = 128


@dataclass(frozen=True)
class Curve:
    """One measured series: x, median seconds, bytes (or none)."""

    name: str
    label: str
    what: str
    x: list[float]
    seconds: list[float]
    memory: list[int]

    @property
    def milliseconds(self) -> list[float]:
        """Times in ms."""
        return [1e3 * seconds for seconds in self.seconds]

    @property
    def mebibytes(self) -> list[float]:
        """Memory in MiB."""
        return [memory / 2**20 for memory in self.memory]


def plot(curves: list[Curve]) -> plt.Figure:
    """Returns a grid of log-log plots: time in blue on the left, memory in orange on the right."""
    columns = 3
    figure, axes = plt.subplots(
        -(-len(curves) // columns), columns, figsize=(11.5, 9.2), dpi=120, layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    for axis, curve in zip(axes.flat, curves, strict=False):
        _line(axis, curve.x, curve.milliseconds, BLUE, "ms", "o")
        handles, _ = axis.get_legend_handles_labels()
        if curve.memory:
            right = axis.twinx()
            _line(right, curve.x, curve.mebibytes, ORANGE, "MiB", "s")
            handles += right.get_legend_handles_labels()[0]
        axis.legend(handles=handles, fontsize=8, loc="upper left", framealpha=0.9)
        axis.set_title(f"{curve.name}\n", fontsize=10, fontweight="bold")
        axis.text(0.5, 1.03, curve.what, transform=axis.transAxes, ha="center", fontsize=8, color="0.35")
        axis.set_xlabel(curve.label, fontsize=9)
    return figure


def _line(axis: plt.Axes, x: list[float], y: list[float], colour: str, unit: str, marker: str) -> None:
    """Draws points and what fits them; at least a decade of y is shown, so that what is flat looks flat."""
    law = fit_above(x, y) or fit(x, y)
    label = f"{law.fixed:.2g} {unit} + a x^({law})" if law.fixed > 0.005 * min(y) else f"a x^({law})"
    between = np.geomspace(x[0], x[-1], 50)
    axis.loglog(between, law(between), "-", color=colour, linewidth=1, alpha=0.6)
    axis.loglog(x, y, marker, color=colour, markersize=4.5, label=label)
    axis.set_ylabel(unit, color=colour, fontsize=9)
    axis.tick_params(axis="both", labelsize=8)
    axis.tick_params(axis="y", colors=colour, which="both")
    middle, reach = (min(y) * max(y)) ** 0.5, max((max(y) / min(y)) ** 0.5, 3.2)
    axis.set_ylim(middle / reach / 1.3, middle * reach * 2.5)  # room for the legend
    ticks = [x[0]]
    for value in x[1:]:
        if math.log(value / ticks[-1]) > 0.12 * math.log(x[-1] / x[0]):  # else their labels would touch
            ticks.append(value)
    axis.set_xticks(ticks, [f"{value / 1e6:.2g} M" if value >= 1e5 else f"{value:g}" for value in ticks])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if reach < 12 else (1,)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.minorticks_off()


def table(curves: list[Curve]) -> list[str]:
    """Returns the lines of the table of exponents."""
    lines = [
        "| grows | from | to | ms | a·x^b: b | c + a·x^b: b | c, ms | MiB | a·x^b: b | c + a·x^b: b | c, MiB | what it is |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for curve in curves:
        time, memory = cells(curve.x, curve.milliseconds), cells(curve.x, curve.mebibytes)
        lines.append(
            f"| {curve.name}: {curve.label} | {curve.x[0]:,.0f} | {curve.x[-1]:,.0f} | {time} | {memory} | {curve.what} |"
        )
    return lines


def cells(x: list[float], y: list[float]) -> str:
    """Returns the four cells of the table that say how y grows."""
    if not y:
        return "– | – | – | –"
    above = fit_above(x, y)
    return f"{y[0]:.3g} to {y[-1]:.3g} | {fit(x, y)} | " + (f"{above} | {above.fixed:.2g}" if above else "– | –")


def introduction() -> str:
    """Returns what was measured, how and on what."""
    return paragraph(
        f"Written by `python -m benchmarks.scaling`; float32, {os.cpu_count()} CPU cores, torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}. One quantity grows, the rest stays. The steps "
        "of a series take turns in one process, and medians count. Two fits, by least squares on logarithms: a power law "
        "a·x^b, and one above a fixed cost c, most of what a small step costs. After ± stands the standard error that the "
        "points' distance from the curve gives. The plot shows the second fit, or the first where nothing grows."
    )


def findings(
    curves: list[Curve], processes: dict[str, list[float]] | None, peaks: tuple[float, float] | None, again: Activations
) -> list[str]:
    """Returns what there is to say about the figures."""
    flat = next(curve for curve in curves if curve.name == "diffusion steps, training")
    memory = (
        "**Memory** is parameters, gradients, Adam's two moments and every tensor that autograd keeps "
        "(`saved_tensors_hooks`), each storage once: exact, and the same on every run. Temporaries are left out."
    )
    if peaks:
        memory += (
            f" For the U-Net at batch {PEAK_BATCH} it counts {peaks[0]:.0f} MiB; the resident peak of a process of its own "
            f"rose by {peaks[1]:.0f} MiB, with temporaries, libraries' buffers and what the allocator keeps."
        )
    points = [
        f"Training takes the same time whatever T is (exponent {fit(flat.x, flat.seconds)}). A sample takes T calls of the "
        "network one after the other; the exact bound puts up to 32 steps of the 8 images into one call.",
        "Time above the fixed cost grows about as the arithmetic does: less where larger products run more efficiently, more "
        "where tensors outgrow the caches. With the resolution it grows faster than the pixels: the arithmetic of attention, "
        "at half the height, grows with their square. Its memory does not, as the fused kernel keeps no matrix of weights.",
        "Width enters parameters squared and activations once: memory follows the parameters only when they outweigh what is "
        "kept of the images.",
        memory,
        str(again),
    ]
    if processes:
        points.append(_ranks(processes))
    return [bullet(point) for point in points]


def _ranks(processes: dict[str, list[float]]) -> str:
    """Returns what the times of one and of two processes say."""
    one, two, apart = (1e3 * statistics.median(processes[name]) for name in ("one", "two", "apart"))
    ratios = [a / b for a, b in zip(processes["one"], processes["two"], strict=True)]
    return (
        f"**Ranks**: two processes took {two:.3g} ms a step and one {one:.3g}, in the median round "
        f"{statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} rounds). "
        f"Two jobs of half the batch at the same time, that know nothing of each other, take {apart:.3g} ms a step: so much "
        "the machine allows, and the rest "
        f"({two - apart:.2g} ms) is what acting as one costs: gradients are added up, and each draws the whole batch's noise. "
        "Two cores show no more than that: nothing of many ranks, nothing of GPUs. See [projection.md](projection.md)."
    )


def document(
    curves: list[Curve], processes: dict[str, list[float]] | None, peaks: tuple[float, float] | None, again: Activations
) -> str:
    """Returns docs/scaling.md."""
    parts = [
        "# How time and memory grow",
        "",
        introduction(),
        "",
        "![log-log plots](images/scaling.png)",
        "",
        *table(curves),
        "",
    ]
    return "\n".join([*parts, *findings(curves, processes, peaks, again), ""])
