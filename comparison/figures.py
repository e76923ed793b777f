"""The plots of a comparison, one colour a group: learning curves, KL of each step, rate and distortion, a heat map."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import Any

import numpy as np
import plotly.graph_objects as go

from comparison.collect import curve, level_kls, rate_distortion
from comparison.groups import Group, shown
from runs.directory import higher_is_better

# five that the colour-blind tell apart, and five more, whose lines are dashed: blue and purple are one colour to some of them
COLOURS = ("#4a7fc9", "#cf6226", "#3f9a63", "#7d8592", "#7c972c", "#9a66b8", "#b38d28", "#469cae", "#c25a80", "#b0603a")
DASHES = ("solid", "dash", "dot", "dashdot")
FEW = 12  # points of a line that are marked
LONG = 60  # letters in a line of the legend


def figure(title: str, x: str, y: str, kind: str = "linear") -> go.Figure:
    """Returns an empty figure with its captions."""
    made = go.Figure()
    made.update_layout(title={"text": title, "x": 0}, height=420, margin={"l": 60, "r": 20, "t": 50, "b": 50}, template="none")
    made.update_layout(hoverlabel={"namelength": -1})  # the first fifteen letters of all are often the same
    made.update_xaxes(title=x, type=kind, automargin=True, exponentformat="power")
    made.update_yaxes(title={"text": y, "standoff": 12}, type=kind, automargin=True, exponentformat="power")
    return made


def entry(label: str) -> str:
    """Returns a group's label as the legend and the pointer show it: in several lines where one would take the plot's room."""
    rows = [label] if len(label) <= LONG else wrap(label, LONG, break_on_hyphens=False, break_long_words=False)
    return "<br>".join(map(plain, rows))


def plain(text: str) -> str:
    """Returns a text that Plotly, which reads some markup in names, shows as it is."""
    return html.escape(text, quote=False)


def look(number: int) -> tuple[str, str]:
    """Returns the colour and the dash of a group's lines: forty pairs, and like colours share no dash in the first twenty."""
    five = number // 5
    return COLOURS[number % len(COLOURS)], DASHES[(five + five // len(DASHES)) % len(DASHES)]


def lines(groups: Sequence[Group], made: go.Figure, of, every_run: bool = True, images=None) -> go.Figure:
    """Adds a line for each run that has one, one colour a group; a group's legend entry shows and hides all of them.

    Args:
        groups: best first.
        made: the figure.
        of: run -> (x, y).
        every_run: ``False`` stops at the first run of a group that has a line.
        images: run -> the same line over images seen, to change to where every line has it.
    """
    for number, group in enumerate(groups):
        colour, dash = look(number)
        drawn = 0
        for run in group.runs:
            x, y = of(run)
            seen = images(run)[0] if images else []
            if x and (every_run or not drawn):
                made.add_scatter(
                    x=x, y=y, mode="lines+markers" if len(x) <= FEW else "lines", name=entry(group.label),
                    legendgroup=str(number), showlegend=not drawn, opacity=0.9, hovertext=plain(run.name),
                    meta=seen if len(seen) == len(x) else None,
                    line={"color": colour, "width": 1.6, "dash": dash},
                )  # fmt: skip
                drawn += 1
    if images and made.data and all(line.meta for line in made.data):
        made.update_layout(meta="images seen")
    return made


def figures(groups: Sequence[Group], metric: str) -> dict[str, go.Figure]:
    """Returns every figure that these runs have data for: {id: figure}."""
    made = {"curves": learning(groups, "Validation", "val/bpd", "val/bpd")}
    if not made["curves"].data or any(run.continuous for own in groups for run in own.runs):  # which has no bits/dim
        made["elbo"] = learning(groups, "Validation ELBO", "val/elbo (nats)", "val/elbo")
    caption = "Cost of each latent or step (the last is the prior term), first seed"
    if any(cost <= 0 for own in groups for cost in level_kls(own.runs[0])[1]):
        caption += "; those of 0 or less are left out"  # as log ratios of a drawn chain may be
    made["levels"] = lines(
        groups,
        figure(caption, "t", "KL or ln q/p (nats)", "log"),
        lambda run: thin(*positive(*level_kls(run))),
        every_run=False,
    )
    made["rate"] = lines(
        groups,
        figure("Rate and distortion, first seed", "rate (bits/dim)", "RMSE of x̂₀ (levels)"),
        rate_distortion,
        every_run=False,
    )
    if len(groups[0].values) == 2 and len(groups) > 3:
        made["heat"] = heat_map(groups, metric)
    return {name: one for name, one in made.items() if one.data}


def learning(groups: Sequence[Group], title: str, caption: str, metric: str) -> go.Figure:
    """Returns the learning curves of a metric over optimiser steps, and over images seen where the runs counted them."""
    return lines(
        groups,
        figure(title, "optimiser step", caption),
        lambda run: thin(*curve(run, metric)),
        images=lambda run: thin(*curve(run, metric, "images_seen")),
    )


def positive(t: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Leaves out what a logarithm cannot show."""
    kept = [(one, value) for one, value in zip(t, values, strict=True) if value > 0]
    return [one for one, _ in kept], [value for _, value in kept]


def thin(x: list, y: list, most: int = 400) -> tuple[list, list]:
    """Keeps at most ``most`` points of a long line, the last one among them."""
    if len(x) <= most:
        return x, y
    kept = sorted({round(i) for i in np.linspace(0, len(x) - 1, most)})
    return [x[i] for i in kept], [y[i] for i in kept]


def heat_map(groups: Sequence[Group], metric: str) -> go.Figure:
    """Returns the metric over two varied settings: of a grid as cells, of a search, whose numbers hardly recur, as points."""
    first, second = groups[0].values
    down, across = (ordered(group.values[key] for group in groups) for key in (first, second))
    cell = {(shown(group.values[first]), shown(group.values[second])): group.mean for group in groups}
    if 2 * len(cell) < len(down) * len(across):
        return points(groups, metric)
    values = [[cell.get((row, column)) for column in across] for row in down]
    made = figure(f"{plain(metric)}, mean over seeds", plain(second), plain(first), "category")
    made.add_heatmap(
        x=[plain(name) for name in across], y=[plain(name) for name in down], z=values, colorscale="Viridis",
        reversescale=not higher_is_better(metric), texttemplate="%{z:.3f}", hoverongaps=False,
    )  # fmt: skip
    made.update_yaxes(autorange="reversed")  # read from the top
    made.update_layout(height=max(420, 130 + 22 * len(down)))
    return made


def points(groups: Sequence[Group], metric: str) -> go.Figure:
    """Returns the metric over two varied numbers, a point for each group; empty where one is no number in some groups."""
    first, second = groups[0].values
    down, across = ([group.values[key] for group in groups] for key in (first, second))
    if not all(type(value) in (int, float) for value in (*down, *across)):
        return go.Figure()
    made = figure(f"{plain(metric)}, mean over seeds", plain(second), plain(first))
    made.update_xaxes(type=_scale(across)).update_yaxes(type=_scale(down))
    means = [group.mean for group in groups]
    colours = {"color": means, "colorscale": "Viridis", "reversescale": not higher_is_better(metric), "showscale": True}
    made.add_scatter(
        x=across, y=down, mode="markers", name="", text=[f"{mean:.4f}" for mean in means], marker={"size": 12, **colours}
    )
    return made


def _scale(values: Sequence[float]) -> str:
    return "log" if min(values) > 0 and max(values) > 30 * min(values) else "linear"


def ordered(values: Iterable[Any]) -> list[str]:
    """Returns the different values as they are printed, numbers by size and before words."""
    found = {shown(value): value if isinstance(value, (int, float)) else math.inf for value in values}
    return sorted(found, key=lambda text: (found[text], text))
