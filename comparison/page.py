"""One self-contained HTML page: no request leaves it, and it opens from a file."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from comparison.collect import Run, curve, level_kls, rate_distortion
from comparison.groups import Group
from comparison.tables import cells, header

COLOURS = ("#3b6fb6", "#c2541b", "#3a8f5c", "#8a55a8", "#b8922a", "#4aa3b5", "#b5476f", "#6b7280", "#7f9a2e", "#a0522d")

STYLE = """
:root { color-scheme: light dark; --text: #1c1f24; --back: #ffffff; --soft: #e4e7ec; --strong: #f4f6f9; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --back: #15181d; --soft: #2c323b; --strong: #1d2229; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 1180px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--soft); text-align: right; white-space: nowrap; }
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
    for (const axis of ['xaxis', 'yaxis']) layout[axis] = Object.assign({gridcolor: soft, zerolinecolor: soft}, layout[axis]);
    Plotly.react(id, figure.data, layout, {responsive: true, displaylogo: false});
  }
}
paint(); dark.addEventListener('change', paint);
document.querySelectorAll('th').forEach((head, column) => head.addEventListener('click', () => {
  const body = head.closest('table').tBodies[0], up = head.getAttribute('aria-sort') !== 'ascending';
  const number = cell => { const value = parseFloat(cell.replace(/,/g, '')); return isNaN(value) ? null : value; };
  const rows = [...body.rows].sort((a, b) => {
    const x = a.cells[column].innerText, y = b.cells[column].innerText, m = number(x), n = number(y);
    return (m !== null && n !== null ? m - n : x.localeCompare(y)) * (up ? 1 : -1);
  });
  body.append(...rows);
  document.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
}));
"""


def figure(title: str, x: str, y: str, kind: str = "linear") -> go.Figure:
    """Returns an empty figure with its captions."""
    made = go.Figure()
    made.update_layout(title=title, height=420, margin={"l": 60, "r": 20, "t": 50, "b": 50}, template="none")
    made.update_xaxes(title=x, type=kind)
    made.update_yaxes(title=y, type=kind)
    return made


def lines(groups: Sequence[Group], made: go.Figure, of, every_run: bool = True) -> go.Figure:
    """Adds a line for each run, one colour a group; a group's legend entry shows and hides all of them."""
    for number, group in enumerate(groups):
        for index, run in enumerate(group.runs if every_run else group.runs[:1]):
            x, y = of(run)
            if x:
                made.add_scatter(
                    x=x, y=y, mode="lines", name=group.label, legendgroup=group.label, showlegend=index == 0,
                    line={"color": COLOURS[number % len(COLOURS)], "width": 1.6}, opacity=0.85, hovertext=run.name,
                )  # fmt: skip
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
            figure("KL of each latent or step", "t", "KL (nats)", "log"),
            lambda run: thin(*positive(*level_kls(run))),
            every_run=False,
        ),
        "rate": lines(
            groups, figure("Rate and distortion", "rate (bits/dim)", "RMSE of x̂₀ (levels)"), rate_distortion, every_run=False
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
    rows, columns = (sorted({str(group.values[key]) for group in groups}) for key in (first, second))
    cell = {(str(group.values[first]), str(group.values[second])): group.mean for group in groups}
    values = [[cell.get((row, column)) for column in columns] for row in rows]
    made = figure(f"{metric}, mean over seeds", second, first, "category")
    made.add_heatmap(x=columns, y=rows, z=values, colorscale="Viridis", reversescale=True, texttemplate="%{z:.3f}")
    return made


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
    return f'<h2>Samples, same seed</h2><div class="grids">{"".join(parts)}</div>' if parts else ""


def config_diffs(runs: Sequence[Run]) -> str:
    """Returns, for each run, the settings in which it differs from what most runs have."""
    keys = sorted({key for run in runs for key in run.settings})
    common = {}
    for key in keys:
        values = [repr(run.settings.get(key)) for run in runs]
        common[key] = max(set(values), key=values.count)
    parts = []
    for run in runs:
        own = [f"{key}: {run.settings.get(key)!r}" for key in keys if repr(run.settings.get(key)) != common[key]]
        text = html.escape("\n".join(own) or "as most runs")
        parts.append(
            f'<details id="{html.escape(run.name)}"><summary>{html.escape(str(run.path))}</summary><pre>{text}</pre></details>'
        )
    return "<h2>What each run differs in</h2>" + "".join(parts)


def table(groups: Sequence[Group], metric: str) -> str:
    """Returns the sortable table."""
    names, text = header(groups, metric), len(groups[0].values)
    head = "".join(f'<th class="{"name" if i < text else ""}">{html.escape(name)}</th>' for i, name in enumerate(names))
    rows = []
    for group in groups:
        row = "".join(
            f'<td class="{"name" if i < text else ""}">{html.escape(cell)}</td>' for i, cell in enumerate(cells(group))
        )
        rows.append(f'<tr class="{"best" if group is groups[0] else ""}">{row}</tr>')
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def page(groups: Sequence[Group], metric: str, left_out: Sequence[str], title: str) -> str:
    """Returns the whole page."""
    made = figures(groups, metric)
    data = json.dumps({name: json.loads(one.to_json()) for name, one in made.items()}).replace("</", "<\\/")
    plots = "".join(f'<div id="{name}"></div>' for name in made)
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
<h2>Plots</h2>{plots}
{sample_grids(groups)}
{config_diffs(runs)}
<script>{get_plotlyjs()}</script>
<script type="application/json" id="figures">{data}</script>
<script>{SCRIPT}</script></body></html>
"""
