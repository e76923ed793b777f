"""One self-contained HTML page: no request leaves it, and it opens from a file."""

from __future__ import annotations

import base64
import html
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from comparison.collect import Run, curve, level_kls, rate_distortion
from comparison.groups import Group, higher_is_better, shown
from comparison.tables import header, rows

COLOURS = ("#4a7fc9", "#cf6226", "#3f9a63", "#9a66b8", "#b38d28", "#469cae", "#c25a80", "#7d8592", "#7c972c", "#b0603a")
DASHES = ("solid", "dash", "dot", "dashdot")  # where there are more groups than colours
FEW = 12  # points of a line that are marked

STYLE = """
:root { color-scheme: light dark; --text: #1c1f24; --back: #ffffff; --soft: #e4e7ec; --strong: #f4f6f9; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --back: #15181d; --soft: #2c323b; --strong: #1d2229; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 1240px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .45rem; border-bottom: 1px solid var(--soft); text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; } .plot { margin: 0 0 1.6rem; }
th.name, td.name { text-align: left; } th { cursor: pointer; background: var(--strong); } tr.best td { font-weight: 600; }
th[aria-sort=ascending]::after { content: " ▲"; } th[aria-sort=descending]::after { content: " ▼"; }
.grids { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; width: 260px; } figure img { width: 100%; }
figcaption, .note { font-size: .85rem; opacity: .8; } details { margin: .3rem 0; } pre { overflow-x: auto; }
"""

SCRIPT = """
const figures = JSON.parse(document.getElementById('figures').textContent);
const dark = window.matchMedia('(prefers-color-scheme: dark)');
function paint() {
  const text = dark.matches ? '#e6e8eb' : '#1c1f24', soft = dark.matches ? '#2c323b' : '#e4e7ec';
  for (const [id, figure] of Object.entries(figures)) {
    const layout = structuredClone(figure.layout);
    layout.paper_bgcolor = layout.plot_bgcolor = 'rgba(0,0,0,0)'; layout.font = {color: text};
    layout.modebar = {bgcolor: 'rgba(0,0,0,0)', color: text, activecolor: text};
    for (const axis of ['xaxis', 'yaxis']) layout[axis] = Object.assign({gridcolor: soft, zerolinecolor: soft}, layout[axis]);
    // Plotly's own "Share chart" would send the data away
    Plotly.react(id, figure.data, layout, {responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: ''});
  }
}
paint(); dark.addEventListener('change', paint);
function key(text) {  // numbers, then words, then nothing
  const number = text === 'best' ? 0 : Number(text.split(' ')[0].replace(/,/g, ''));
  return text === '' ? [2, 0] : isNaN(number) ? [1, 0] : [0, number];
}
function sort(head, column) {
  const body = head.closest('table').tBodies[0], up = head.getAttribute('aria-sort') !== 'ascending';
  const sorted = [...body.rows].map(row => [row, row.cells[column].textContent]).sort(([, x], [, y]) => {
    const [kind, value] = key(x), [otherKind, other] = key(y);
    return kind - otherKind || (kind ? x.localeCompare(y) : value - other) * (up ? 1 : -1);
  });
  body.append(...sorted.map(([row]) => row));
  document.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
}
document.querySelectorAll('th').forEach((head, column) => {
  head.addEventListener('click', () => sort(head, column));
  head.addEventListener('keydown', event => { if (event.key === 'Enter') sort(head, column); });
});
"""


def figure(title: str, x: str, y: str, kind: str = "linear") -> go.Figure:
    """Returns an empty figure with its captions."""
    made = go.Figure()
    made.update_layout(title={"text": title, "x": 0}, height=420, margin={"l": 60, "r": 20, "t": 50, "b": 50}, template="none")
    made.update_xaxes(title=x, type=kind, automargin=True)
    made.update_yaxes(title={"text": y, "standoff": 12}, type=kind, automargin=True)
    return made


def plain(text: str) -> str:
    """Returns a text that Plotly, which reads some markup in names, shows as it is."""
    return html.escape(text, quote=False)


def lines(groups: Sequence[Group], made: go.Figure, of, every_run: bool = True) -> go.Figure:
    """Adds a line for each run that has one, one colour a group; a group's legend entry shows and hides all of them.

    Args:
        groups: best first.
        made: the figure.
        of: run -> (x, y).
        every_run: ``False`` stops at the first run of a group that has a line.
    """
    for number, group in enumerate(groups):
        dash = DASHES[number // len(COLOURS) % len(DASHES)]
        drawn = 0
        for run in group.runs:
            x, y = of(run)
            if x and (every_run or not drawn):
                made.add_scatter(
                    x=x, y=y, mode="lines+markers" if len(x) <= FEW else "lines", name=plain(group.label),
                    legendgroup=str(number), showlegend=not drawn, opacity=0.9, hovertext=plain(run.name),
                    line={"color": COLOURS[number % len(COLOURS)], "width": 1.6, "dash": dash},
                )  # fmt: skip
                drawn += 1
    return made


def figures(groups: Sequence[Group], metric: str) -> dict[str, go.Figure]:
    """Returns every figure that these runs have data for: {id: figure}."""
    made = {
        "curves": lines(groups, figure("Validation", "optimiser step", "val/bpd"), lambda run: thin(*curve(run, "val/bpd"))),
        "elbo": lines(
            groups, figure("Validation ELBO", "optimiser step", "val/elbo (nats)"), lambda run: thin(*curve(run, "val/elbo"))
        ),
        "levels": lines(
            groups,
            figure("KL of each latent or step, first seed", "t", "KL (nats)", "log"),
            lambda run: thin(*positive(*level_kls(run))),
            every_run=False,
        ),
        "rate": lines(
            groups,
            figure("Rate and distortion, first seed", "rate (bits/dim)", "RMSE of x̂₀ (levels)"),
            rate_distortion,
            every_run=False,
        ),
    }
    if made["curves"].data:
        del made["elbo"]
    if len(groups[0].values) == 2 and len(groups) > 3:
        made["heat"] = heat_map(groups, metric)
    return {name: one for name, one in made.items() if one.data}


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
    """Returns the metric over two varied settings."""
    first, second = groups[0].values
    down, across = (ordered(group.values[key] for group in groups) for key in (first, second))
    cell = {(shown(group.values[first]), shown(group.values[second])): group.mean for group in groups}
    values = [[cell.get((row, column)) for column in across] for row in down]
    made = figure(f"{plain(metric)}, mean over seeds", plain(second), plain(first), "category")
    made.add_heatmap(
        x=[plain(name) for name in across], y=[plain(name) for name in down], z=values, colorscale="Viridis",
        reversescale=not higher_is_better(metric), texttemplate="%{z:.3f}", textfont={"size": 14}, hoverongaps=False,
    )  # fmt: skip
    made.update_yaxes(autorange="reversed")  # read from the top
    return made


def ordered(values: Iterable[Any]) -> list[str]:
    """Returns the different values as they are printed, numbers by size and before words."""
    found = {shown(value): value if isinstance(value, (int, float)) else math.inf for value in values}
    return sorted(found, key=lambda text: (found[text], text))


def sample_grids(groups: Sequence[Group]) -> str:
    """Returns the final samples of each group's first seed, side by side."""
    parts = []
    for group in groups:
        path = group.runs[0].path / "samples" / "final.png"
        if path.is_file():
            data = base64.b64encode(path.read_bytes()).decode()
            caption = html.escape(f"{group.label} (seed {group.runs[0].seed})")
            parts.append(
                f'<figure><img alt="samples" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
            )
    return f'<h2>Samples</h2><div class="grids">{"".join(parts)}</div>' if parts else ""


def config_diffs(runs: Sequence[Run]) -> str:
    """Returns, for each run, the settings in which it differs from what most runs have."""
    keys = sorted({key for run in runs for key in run.settings})
    common = {}
    for key in keys:
        common[key] = Counter(repr(run.settings.get(key)) for run in runs).most_common(1)[0][0]
    parts = []
    for run in runs:
        own = [f"{key}: {run.settings.get(key)!r}" for key in keys if repr(run.settings.get(key)) != common[key]]
        text = html.escape("\n".join(own) or "as most runs")
        parts.append(f"<details><summary>{html.escape(str(run.path))}</summary><pre>{text}</pre></details>")
    return "<h2>What each run differs in</h2>" + "".join(parts)


def table(groups: Sequence[Group], metric: str) -> str:
    """Returns the sortable table."""
    names, text = header(groups, metric), len(groups[0].values)
    kinds = ["name" if index < text else "number" for index in range(len(names))]
    head = "".join(f'<th tabindex="0" class="{kind}">{html.escape(name)}</th>' for kind, name in zip(kinds, names, strict=True))
    body = []
    for index, row in enumerate(rows(groups)):
        cells = "".join(f'<td class="{kind}">{html.escape(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))
        body.append(f'<tr class="{"other" if index else "best"}">{cells}</tr>')
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def page(groups: Sequence[Group], metric: str, left_out: Sequence[str], title: str) -> str:
    """Returns the whole page."""
    made = figures(groups, metric)
    data = json.dumps({name: json.loads(one.to_json()) for name, one in made.items()}).replace("<", "\\u003c")
    plots = "".join(f'<div class="plot" id="{name}"></div>' for name in made)
    missing = "".join(f"<li>{html.escape(line)}</li>" for line in left_out)
    runs = [run for group in groups for run in group.runs]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p class="note">{len(runs)} runs in {len(groups)} groups, best first by {html.escape(metric)}. Click a heading to sort, a legend
entry to hide its runs. Differences are paired over common seeds, with a 95% confidence interval.</p>
{table(groups, metric)}
{f"<h2>Left out</h2><ul>{missing}</ul>" if missing else ""}
{f"<h2>Plots</h2>{plots}" if plots else ""}
{sample_grids(groups)}
{config_diffs(runs)}
<script>{get_plotlyjs()}</script>
<script type="application/json" id="figures">{data}</script>
<script>{SCRIPT}</script></body></html>
"""
