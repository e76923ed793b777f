"""Two things timed in turns: what counts is the ratio of each pair, which a machine's changing speed leaves alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: what is measured.
        against: what with.
        ratio: median of the pairs' ratios.
        low, high: the smallest and the largest.
        pairs: how many there are.
        target: what the ratio should reach.
        at_most: whether the target is an upper bound.
        figures: both medians, in words.
    """

    name: str
    against: str
    ratio: float
    low: float
    high: float
    pairs: int
    target: float
    at_most: bool
    figures: str

    @property
    def met(self) -> bool:
        """Whether the median reaches the target."""
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target

    def record(self) -> dict[str, Any]:
        """Returns the row as plain values."""
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True)
class Pairs:
    """Seconds of each turn, ours and theirs."""

    ours: Sequence[float]
    theirs: Sequence[float]

    def ratios(self, at_most: bool) -> list[float]:
        """Returns ours/theirs of each pair if ``at_most``, else theirs/ours."""
        return [(a / b if at_most else b / a) for a, b in zip(self.ours, self.theirs, strict=True)]

    def row(self, name: str, against: str, target: float, at_most: bool, figures: str, work: float = 1.0) -> Row:
        """Returns the line of these pairs.

        Args:
            name: what is measured.
            against: what with.
            target: of ours/theirs where ``at_most``, else of theirs/ours.
            at_most: whether the target is an upper bound.
            figures: a text with {ours} and {theirs}, of the medians in ms times ``work``.
            work: what the medians are multiplied by.
        """
        over = self.ratios(at_most)
        ours, theirs = (f"{1e3 * work * statistics.median(times):,.4g}" for times in (self.ours, self.theirs))
        text = figures.format(ours=ours, theirs=theirs)
        return Row(name, against, statistics.median(over), min(over), max(over), len(over), target, at_most, text)


def timed(function: Callable[[], object]) -> float:
    """Returns the seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turns(ours: Callable[[], object], theirs: Callable[[], object], rounds: int, warm_up: int = 1) -> Pairs:
    """Times both in turns, the one that comes first changing from round to round."""
    for _ in range(warm_up):
        ours(), theirs()
    mine, others = [], []
    for turn in range(rounds):
        if turn % 2:
            others.append(timed(theirs))
        mine.append(timed(ours))
        if not turn % 2:
            others.append(timed(theirs))
    return Pairs(mine, others)


def table(rows: Sequence[Row]) -> list[str]:
    """Returns the lines of a Markdown table."""
    lines = [
        "| what | against | ratio (lowest to highest) | pairs | target | met | medians, ours and theirs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        target = f"{'≤' if row.at_most else '≥'} {row.target:g}"
        spread = f"{row.ratio:.3g} ({row.low:.3g} to {row.high:.3g})"
        met = "yes" if row.met else "no"
        lines.append(f"| {row.name} | {row.against} | {spread} | {row.pairs} | {target} | {met} | {row.figures} |")
    return lines
