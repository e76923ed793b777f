"""The comparison as a table: for people in the terminal, in Markdown and on the page, for programs as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from comparison.groups import LEVEL, Group, shown

LEAST_WIDTH = 3  # of a setting's column
TERMS = ("reconstruction", "prior", "matching")  # of losses.elbo.SIGNS, which needs torch: a comparison does not


def _unit(groups: Sequence[Group]) -> str:
    """Returns the costs' unit: bits/dim where every run has them, as continuous data has not."""
    runs = [run for group in groups for run in group.runs]
    return "bits_per_dim" if all("bits_per_dim" in run.result.get("costs", {}).get("elbo", {}) for run in runs) else "nats"


def header(groups: Sequence[Group], metric: str) -> list[str]:
    """Returns the columns' names."""
    unit = _unit(groups).replace("_per_", "/")
    return [
        *groups[0].values,
        "runs",
        metric,
        "sd",
        f"difference ± {LEVEL:.0%}",
        *(f"{term} ({unit})" for term in TERMS),
        "parameters",
        "seconds",
        "images/s",
    ]


def rows(groups: Sequence[Group]) -> list[list[str]]:
    """Returns a row for each group."""
    unit = _unit(groups)
    return [_cells(group, unit) for group in groups]


def _cells(group: Group, unit: str) -> list[str]:
    parameters, seconds, speed = _efforts(group).values()
    return [
        *(shown(value) for value in group.values.values()),
        str(len(group.runs)),
        f"{group.mean:.4f}",
        "" if math.isnan(group.deviation) else f"{group.deviation:.4f}",
        _difference(group),
        *("" if term is None else f"{term:.4f}" for term in _costs(group, unit).values()),
        "" if parameters is None else f"{parameters:,.0f}",
        "" if seconds is None else f"{seconds:.0f}",
        "" if speed is None else f"{speed:,.0f}",
    ]


def _difference(group: Group) -> str:
    mean, half = group.difference
    if math.isnan(mean):
        return "no common seed"
    if group.is_best:
        return "best"
    return f"{mean:+.4f}" if math.isnan(half) else f"{mean:+.4f} ± {half:.4f}"


def terminal(groups: Sequence[Group], metric: str, console: Console) -> Table:
    """Returns the table for a terminal, best first, with as many of the terms, sizes and times as it has room for.

    The files have them all. Where there is no room for the rest either, settings are folded before numbers are, in one column
    where each would be left with a letter or none.
    """
    settings = len(groups[0].values)
    least = settings + 4  # runs, metric, sd, difference
    for columns in range(len(header(groups, metric)), least - 1, -1):
        table = _table(groups, metric, settings, columns)
        room = console.width - Measurement.get(console, console.options.update(width=10**6), table).maximum
        if room >= 0:
            return table
    columns = zip(*(group.values.values() for group in groups), strict=True)
    widths = [max(map(cell_len, (name, *map(shown, column)))) for name, column in zip(groups[0].names, columns, strict=False)]
    if not settings or room + sum(widths) >= sum(min(width, LEAST_WIDTH) for width in widths):
        return table
    return _table(groups, metric, settings, least, together=True)


def _table(groups: Sequence[Group], metric: str, settings: int, columns: int, together: bool = False) -> Table:
    names = [*groups[0].names, *(name.split(" (")[0] for name in header(groups, metric)[settings:])]
    title = f"{metric}, best first; costs in {_unit(groups).replace('_per_', '/')}"
    table = Table(title=escape(title), title_justify="left")
    if together:
        names, settings, columns = ["settings", *names[settings:]], 1, columns - settings + 1
    for index, name in enumerate(names[:columns]):
        left = index < settings
        table.add_column(escape(name), justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for group, row in zip(groups, rows(groups), strict=True):
        if group.is_best and table.rows:
            table.add_section()  # of other images
        row = [group.label, *row[len(group.values) :]] if together else row
        table.add_row(*map(escape, row[:columns]), style="bold" if group.is_best else None)
    return table


def as_csv(groups: Sequence[Group], metric: str) -> str:
    """Returns the table as CSV: one number a cell, in full precision, and nothing where there is none."""
    text = io.StringIO()
    records = [{**one.values, **_numbers(one, metric, _unit(groups))} for one in groups]
    writer = csv.DictWriter(text, records[0])
    writer.writeheader()
    writer.writerows({key: None if _is_nan(value) else value for key, value in record.items()} for record in records)
    return text.getvalue()


def _numbers(one: Group, metric: str, unit: str) -> dict[str, object]:
    """Returns {column: number} of a group; the difference to the best, its interval and its seeds are empty for the best."""
    mean, half = (math.nan, math.nan) if one.is_best else one.difference
    return {
        "metric": metric,
        "n": len(one.runs),
        "mean": one.mean,
        "sd": one.deviation,
        "difference": mean,
        "ci_low": mean - half,
        "ci_high": mean + half,
        "common_seeds": one.common_seeds or None,
        "unit": unit,
        **_costs(one, unit),
        **_efforts(one),
    }


def _costs(one: Group, unit: str) -> dict[str, float | None]:
    return {term: one.average(lambda run, term=term: run.result.get("costs", {}).get(term, {}).get(unit)) for term in TERMS}


def _efforts(one: Group) -> dict[str, float | None]:
    return {
        "parameters": one.average(lambda run: run.result.get("parameters")),
        "seconds": one.average(lambda run: run.result.get("seconds", {}).get("total")),
        "images_per_second": one.average(lambda run: run.images_per_second),
    }


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _in_a_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def as_markdown(groups: Sequence[Group], metric: str, left_out: Sequence[str]) -> str:
    """Returns the table as Markdown, with what was left out below."""
    names = header(groups, metric)
    kept = [[_in_a_cell(text) for text in row] for row in (names, *rows(groups))]
    lines = [f"| {' | '.join(row)} |" for row in (kept[0], ["---"] * len(names), *kept[1:])]
    return "\n".join([*lines, "", *(f"- {line}" for line in left_out), ""])
