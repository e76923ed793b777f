"""One self-contained HTML page: no request leaves it, and it opens from a file."""

from __future__ import annotations

import base64
import html
import json
from collections import Counter
from collections.abc import Sequence

from plotly.offline import get_plotlyjs

from comparison.figures import figures
from comparison.groups import Group
from comparison.tables import header, rows

ANCHOR = "differs-"  # and the number of a group

STYLE = """
:root { color-scheme: light dark; --text: #1c1f24; --back: #ffffff; --soft: #e4e7ec; --strong: #f4f6f9; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --back: #15181d; --soft: #2c323b; --strong: #1d2229; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 1240px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .45rem; border-bottom: 1px solid var(--soft); text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; } .plot { margin: 0 0 1.6rem; min-width: 760px; }
h1, h3, figcaption, summary, li { overflow-wrap: anywhere; }
th.name, td.name { text-align: left; } th { cursor: pointer; background: var(--strong); } tr.best td { font-weight: 600; }
th[aria-sort=ascending]::after { content: " ▲"; } th[aria-sort=descending]::after { content: " ▼"; }
.grids { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; width: 260px; } figure img { width: 100%; }
a { color: inherit; } h3 { font-size: 1rem; margin: 1rem 0 .2rem; } :target { text-decoration: underline; }
button { font: inherit; color: inherit; background: var(--strong); border: 1px solid var(--soft); padding: .3rem .7rem; }
figcaption, .note { font-size: .85rem; opacity: .8; } details { margin: .3rem 0; } pre { overflow-x: auto; }
@media print { .scroll { overflow: visible; } button, .modebar { display: none; } figure, .plot { break-inside: avoid; }
  table { font-size: .75rem; } td.name { white-space: normal; overflow-wrap: anywhere; } }
"""

SCRIPT = """
const figures = JSON.parse(document.getElementById('figures').textContent);
const dark = window.matchMedia('(prefers-color-scheme: dark)');
let overImages = false;
function paint() {
  const text = dark.matches ? '#e6e8eb' : '#1c1f24', soft = dark.matches ? '#2c323b' : '#e4e7ec';
  for (const [id, figure] of Object.entries(figures)) {
    const layout = structuredClone(figure.layout);
    layout.paper_bgcolor = layout.plot_bgcolor = 'rgba(0,0,0,0)'; layout.font = {color: text};
    layout.modebar = {bgcolor: 'rgba(0,0,0,0)', color: text, activecolor: text};
    for (const axis of ['xaxis', 'yaxis']) layout[axis] = Object.assign({gridcolor: soft, zerolinecolor: soft}, layout[axis]);
    let data = figure.data;
    if (overImages && layout.meta) {  // a line's other x is its meta
      data = data.map(line => ({...line, x: line.meta}));
      layout.xaxis.title.text = layout.meta;
    }
    // Plotly's own "Share chart" would send the data away
    Plotly.react(id, data, layout, {responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: ''});
  }
}
paint(); dark.addEventListener('change', paint);
// what is as wide as the screen would be cut off by the paper's edge
const widths = width => Object.keys(figures).forEach(id => Plotly.relayout(id, {width, autosize: width === null}));
addEventListener('beforeprint', () => widths(900));
addEventListener('afterprint', () => widths(null));
const axis = document.getElementById('axis');
axis?.addEventListener('click', () => {
  overImages = !overImages;
  axis.textContent = overImages ? 'over optimiser steps' : 'over images seen';
  paint();
});
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
  head.addEventListener('keydown', event => {
    if (event.key !== 'Enter' && event.key !== ' ') return;
    event.preventDefault();  // a space would scroll
    sort(head, column);
  });
});
"""


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


def config_diffs(groups: Sequence[Group]) -> str:
    """Returns, for each run of each group, the settings in which it differs from what most runs have."""
    runs = [run for group in groups for run in group.runs]
    keys = sorted({key for run in runs for key in run.settings})
    common = {}
    for key in keys:
        common[key] = Counter(repr(run.settings.get(key)) for run in runs).most_common(1)[0][0]
    parts = []
    for number, group in enumerate(groups):
        parts.append(f'<h3 id="{ANCHOR}{number}">{html.escape(group.label)}</h3>')
        for run in group.runs:
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
    for index, (group, row) in enumerate(zip(groups, rows(groups), strict=True)):
        texts = [html.escape(cell) for cell in row]
        texts[text] = f'<a href="#{ANCHOR}{index}" title="what these runs differ in">{texts[text]}</a>'  # how many runs
        cells = "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(kinds, texts, strict=True))
        body.append(f'<tr class="{"best" if group.is_best else "other"}">{cells}</tr>')
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def page(groups: Sequence[Group], metric: str, left_out: Sequence[str], title: str) -> str:
    """Returns the whole page."""
    made = figures(groups, metric)
    data = json.dumps({name: json.loads(one.to_json()) for name, one in made.items()}).replace("<", "\\u003c")
    plots = "".join(f'<div class="scroll"><div class="plot" id="{name}"></div></div>' for name in made)
    if any(one.layout.meta for one in made.values()):
        plots = f'<button id="axis" type="button">over images seen</button>{plots}'
    missing = "".join(f"<li>{html.escape(line)}</li>" for line in left_out)
    runs = [run for group in groups for run in group.runs]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p class="note">{len(runs)} runs in {len(groups)} groups, best first by {html.escape(metric)} among those on the
same images. Click a heading to sort, a legend entry to hide its runs, a number of runs to see what they differ in. Differences
are paired over common seeds, with a 95% confidence interval.</p>
<noscript><p class="note">Sorting and plots want JavaScript, which does not run here.</p></noscript>
{table(groups, metric)}
{f"<h2>Notes</h2><ul>{missing}</ul>" if missing else ""}
{f"<h2>Plots</h2>{plots}" if plots else ""}
{sample_grids(groups)}
{config_diffs(groups)}
<script>{get_plotlyjs()}</script>
<script type="application/json" id="figures">{data}</script>
<script>{SCRIPT}</script></body></html>
"""
