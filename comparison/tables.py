"""The comparison as a table: in the terminal, as CSV and as Markdown, all from the same cells."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from rich.table import Table

from comparison.collect import Run
from comparison.groups import LEVEL, Group

TERMS = ("reconstruction", "prior", "matching")


def _term(run: Run, term: str) -> float | None:
    cost = run.result.get("costs", {}).get(term, {})
    return cost.get("bits_per_dim", cost.get("nats"))


def header(groups: Sequence[Group], metric: str) -> list[str]:
    """Returns the columns' names."""
    unit = "bits/dim" if "bits_per_dim" in groups[0].runs[0].result.get("costs", {}).get("elbo", {}) else "nats"
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


def cells(group: Group) -> list[str]:
    """Returns one group's row."""
    mean, half = group.difference
    difference = "best"
    if group.common_seeds or math.isnan(mean):
        difference = (
            f"{mean:+.4f} ± {half:.4f}"
            if not math.isnan(half)
            else f"{mean:+.4f}"
            if not math.isnan(mean)
            else "no common seed"
        )
    terms = [group.average(lambda run, term=term: _term(run, term)) for term in TERMS]
    parameters = group.average(lambda run: run.result.get("parameters"))
    seconds = group.average(lambda run: run.result.get("seconds", {}).get("total"))
    speed = group.average(lambda run: run.images_per_second)
    return [
        *(str(value) for value in group.values.values()),
        str(len(group.runs)),
        f"{group.mean:.4f}",
        "" if math.isnan(group.deviation) else f"{group.deviation:.4f}",
        difference,
        *("" if term is None else f"{term:.4f}" for term in terms),
        "" if parameters is None else f"{parameters:,.0f}",
        "" if seconds is None else f"{seconds:.0f}",
        "" if speed is None else f"{speed:,.0f}",
    ]


def terminal(groups: Sequence[Group], metric: str) -> Table:
    """Returns the table for the terminal, best first: what the files have beside it is left out, for width."""
    names = header(groups, metric)
    shown = len(groups[0].values) + 4 + len(TERMS)
    table = Table(title=f"{metric}, best first; costs in {names[-4].split()[-1].strip('()')}", title_justify="left")
    for index, name in enumerate(names[:shown]):
        table.add_column(name.split(" (")[0], justify="left" if index < len(groups[0].values) else "right", overflow="fold")
    for group in groups:
        table.add_row(*cells(group)[:shown], style="bold" if group is groups[0] else None)
    return table


def as_csv(groups: Sequence[Group], metric: str) -> str:
    """Returns the table as CSV."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header(groups, metric))
    writer.writerows(cells(group) for group in groups)
    return text.getvalue()


def as_markdown(groups: Sequence[Group], metric: str, left_out: Sequence[str]) -> str:
    """Returns the table as Markdown, with what was left out below."""
    names = header(groups, metric)
    rows = [cells(group) for group in groups]
    lines = [f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *rows)]
    return "\n".join([*lines, "", *(f"- {line}" for line in left_out), ""])
