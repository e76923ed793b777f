"""The page in a browser: no console error, no request, sorting and hiding work, light and dark are readable."""

import html
import json
import re
import shutil
import subprocess

import pytest

from tests.comparison.directories import compare, write_run, write_sweep
from tests.comparison.test_page import HOSTILE

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

# before the page's own scripts: what would leave the page is refused and noted
WATCH = """
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:">
<script>
const seen = {errors: [], refused: [], asked: []};
addEventListener('error', event => seen.errors.push(String(event.message || event.target.tagName)), true);
addEventListener('unhandledrejection', event => seen.errors.push(String(event.reason)));
addEventListener('securitypolicyviolation', event => seen.refused.push(event.violatedDirective + ' ' + event.blockedURI));
for (const level of ['error', 'warn']) console[level] = (...words) => seen.errors.push(words.join(' '));
for (const name of ['fetch', 'XMLHttpRequest', 'WebSocket', 'EventSource']) {
  window[name] = function () { seen.asked.push(name); throw new Error(name); };
}
navigator.sendBeacon = () => seen.asked.push('sendBeacon');
</script>
"""
# after them: steps that fill in ``seen``
REPORT = """
<script>
const wait = milliseconds => new Promise(done => setTimeout(done, milliseconds));
(async () => {
  try { await wait(200); %s } catch (error) { seen.errors.push('test: ' + error.stack); }
  seen.requests = performance.getEntriesByType('resource').map(one => one.name).filter(name => !name.startsWith('data:'));
  const pre = document.createElement('pre');
  pre.id = 'seen'; pre.textContent = JSON.stringify(seen); document.body.append(pre);
})();
</script>
"""


def browse(out, place, steps, dark=False, width=1280):
    """Opens a copy of the page from a file; returns what the steps saw."""
    text = (out / "comparison.html").read_text()
    copy = place / "copy.html"
    place.mkdir()
    head, body = text.split("<head>", 1)
    copy.write_text(f"{head}<head>{WATCH}{body.removesuffix('</body></html>' + chr(10))}{REPORT % steps}</body></html>")
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={place}/user",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={width},2000",
            "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", copy.as_uri(),
        ],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    seen = json.loads(html.unescape(found.group(1)))
    for name in ("errors", "refused", "asked", "requests"):
        assert seen[name] == [], name
    return seen


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    write_sweep(root / "sweep", seeds=(0, 1), extras=True)
    write_run(root / "sweep" / "one seed", 5.0, 0, {"model/schedule": "jsd", "model/weighting": "elbo"})
    write_run(root / "sweep" / "another seed", 10.0, 9, {"model/schedule": "constant", "model/weighting": "elbo"})
    return compare(root / "out", root / "sweep", by=["model/schedule", "model/weighting"])


SORTING = """
const column = index => [...document.querySelectorAll('tbody tr')].map(row => row.cells[index].textContent);
const heads = [...document.querySelectorAll('th')];
seen.heads = heads.map(head => head.textContent);
seen.sorted = heads.map((head, index) => {
  head.click(); const up = column(index), first = head.getAttribute('aria-sort');
  head.click(); const down = column(index), second = head.getAttribute('aria-sort');
  return {up, down, first, second, marked: document.querySelectorAll('[aria-sort]').length};
});
heads[0].dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true}));
seen.byKey = heads[0].getAttribute('aria-sort');
"""
TOGGLING = """
const plot = document.getElementById('curves');
const hidden = () => plot._fullData.map(line => line.visible === 'legendonly');
const drawn = () => plot.querySelectorAll('.scatterlayer .trace').length;
const click = () => {
  const entry = plot.querySelectorAll('.legend .legendtoggle')[1];
  for (const kind of ['mousedown', 'mouseup']) {
    entry.dispatchEvent(new MouseEvent(kind, {bubbles: true, cancelable: true, view: window}));
  }
};
seen.plots = [...document.querySelectorAll('.plot')].map(one => [one.id, one.querySelectorAll('svg').length > 0]);
seen.buttons = [...document.querySelectorAll('.modebar-btn')].map(one => one.getAttribute('data-title'));
seen.groups = plot._fullData.map(line => line.legendgroup);
seen.before = [hidden(), drawn()];
click(); await wait(1000);
seen.hidden = [hidden(), drawn()];
click(); await wait(1000);
seen.after = [hidden(), drawn()];
"""
CHOOSING = """
const plot = document.getElementById('curves'), button = document.getElementById('axis');
const shown = () => [plot._fullLayout.xaxis.title.text, plot._fullData[0].x[0], button.textContent];
seen.over = [shown()];
button.click(); await wait(300); seen.over.push(shown());
button.click(); await wait(300); seen.over.push(shown());
const link = document.querySelector('tbody a');
link.click();
seen.target = document.querySelector(':target').textContent;
"""
READING = """
const colours = node => getComputedStyle(node);
const back = colours(document.body).backgroundColor;
seen.text = [...document.querySelectorAll('h1, td, li, summary, .note, figcaption')].map(node => [colours(node).color, back]);
seen.text.push(...[...document.querySelectorAll('th')].map(node => [colours(node).color, colours(node).backgroundColor]));
seen.text.push(...[...document.querySelectorAll('.gtitle, .xtick text, .legendtext')].map(node => [colours(node).fill, back]));
seen.images = [...document.images].map(image => image.complete && image.naturalWidth);
seen.width = document.documentElement.scrollWidth <= innerWidth;
document.querySelector('summary').click();
seen.diff = document.querySelector('details').open && document.querySelector('details pre').offsetHeight > 0;
"""


def as_number(text):
    return 0.0 if text == "best" else float(text.split(" ")[0].replace(",", ""))


def test_every_column_sorts_both_ways_and_runs_can_be_hidden(sweep, tmp_path):
    seen = browse(sweep, tmp_path / "place", SORTING + TOGGLING)
    for name, column in zip(seen["heads"], seen["sorted"], strict=True):
        assert (column["first"], column["second"], column["marked"]) == ("ascending", "descending", 1)
        kinds = {"numbers": [], "words": []}
        for way in ("up", "down"):
            values = column[way]
            numbers = [as_number(text) for text in values if re.match(r"[-+]?[\d.,]+|best", text)]
            assert numbers == sorted(numbers, reverse=way == "down"), (name, way)
            words = [text for text in values if text and not re.match(r"[-+]?[\d.,]+|best", text)]
            assert words == sorted(words, reverse=way == "down"), (name, way)
            shapes = ["n" if re.match(r"[-+]?[\d.,]+|best", text) else "w" if text else "e" for text in values]
            assert shapes == sorted(shapes, key="nwe".index), (name, way)  # what is missing stays below
            kinds["numbers"].append(sorted(numbers))
        assert kinds["numbers"][0] == kinds["numbers"][1]
    assert seen["byKey"] == "ascending"
    means = seen["sorted"][seen["heads"].index("test/bpd")]["up"]
    assert means[-2:] == ["5.0000", "10.0000"]  # as numbers, not as words
    assert dict(map(tuple, seen["plots"])) == dict.fromkeys(["curves", "levels", "rate", "heat"], True)
    assert not [title for title in seen["buttons"] if re.search("share|cloud|chart studio|edit", title or "", re.IGNORECASE)]
    assert len(seen["buttons"]) > 4
    assert seen["before"] == seen["after"] == [[False] * 12, 12]
    assert seen["hidden"] == [[one == "1" for one in seen["groups"]], 10]


def test_curves_go_over_images_seen_and_numbers_of_runs_lead_to_what_they_differ_in(sweep, tmp_path):
    seen = browse(sweep, tmp_path / "place", CHOOSING)
    steps = ["optimiser step", 10, "over images seen"]
    assert seen["over"] == [steps, ["images seen", 1280, "over optimiser steps"], steps]
    assert seen["target"] == "schedule=linear, weighting=elbo"


LONG = "a_residual_network_with_attention_at_every_resolution_and_a_long_name"
ROOM = """
seen.room = ['curves', 'levels'].map(id => {
  const plot = document.getElementById(id), {l, w} = plot._fullLayout._size;
  const box = name => plot.querySelector(name).getBoundingClientRect(), edge = plot.getBoundingClientRect();
  return [w > 150, edge.left + l + w < box('.legend').left, box('.legend').right < edge.right + 1,
    box('.gtitle').right < edge.right];
});
seen.names = document.getElementById('curves')._fullLayout.hoverlabel.namelength;
seen.captions = [...document.querySelectorAll('figcaption')].map(node => node.scrollWidth <= node.clientWidth);
seen.page = document.documentElement.scrollWidth <= innerWidth;
const width = () => ['curves', 'levels'].map(id => document.getElementById(id)._fullLayout.width);
dispatchEvent(new Event('beforeprint')); await wait(100); seen.paper = width();
dispatchEvent(new Event('afterprint')); await wait(100); seen.screen = width();
"""


@pytest.mark.parametrize("width", [500, 1600])
def test_long_names_leave_room_for_the_curves_and_paper_has_all_of_them(width, tmp_path):
    for number in range(12):
        settings = {"model.latent_dim": number + 0.1234, "model.beta": number}
        write_run(
            tmp_path / "runs" / f"{number}", 2.0 + number, choices={"model/encoder": LONG}, settings=settings, extras=True
        )
    write_run(tmp_path / "runs" / "other", 20.0, choices={"model/encoder": f"{LONG}er"}, extras=True)
    seen = browse(compare(tmp_path / "out", tmp_path / "runs"), tmp_path / "place", ROOM, width=width)
    assert seen["room"] == [[True] * 4] * 2
    assert seen["names"] == -1
    assert len(seen["captions"]) == 13
    assert all(seen["captions"])
    assert seen["page"]
    assert seen["paper"] == [900, 900]
    assert seen["screen"] == [max(width - 32, 760)] * 2 if width < 1000 else [1240 - 32] * 2


def luminance(colour):
    red, green, blue = (float(one) / 255 for one in re.findall(r"[\d.]+", colour)[:3])
    linear = [one / 12.92 if one <= 0.03928 else ((one + 0.055) / 1.055) ** 2.4 for one in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_light_and_dark_are_readable(dark, sweep, tmp_path):
    seen = browse(sweep, tmp_path / "place", READING, dark)
    assert len(seen["text"]) > 60
    for text, back in seen["text"]:
        assert (luminance(back) < 0.2) == dark
        darker, lighter = sorted((luminance(text), luminance(back)))
        assert (lighter + 0.05) / (darker + 0.05) > 7, (text, back)
    assert seen["images"] == [24] * 6
    assert seen["width"]
    assert seen["diff"]


def test_hostile_names_stay_text_in_a_browser(tmp_path):
    for number, name in enumerate(HOSTILE):
        for beta in (1.0, 2.0):
            directory = tmp_path / "runs" / f"{number}-{beta}"
            write_run(directory, 2.0 + number, choices={"model/encoder": name}, settings={"model.beta": beta}, extras=True)
            directory.rename(directory.with_name(f"{beta}{name}".replace("/", "_")))
    write_run(tmp_path / "runs" / "figures", 9.0, choices={"model/encoder": "x"}, extras=True)
    out = compare(tmp_path / "out", tmp_path / "runs")
    steps = """
    seen.cells = [...document.querySelectorAll('tbody tr')].map(row => row.cells[0].textContent);
    const lines = one => [...one.querySelectorAll('.line')].map(line => line.textContent).join(' ');
    seen.legend = [...document.querySelectorAll('#curves .legendtext')].map(one => lines(one) || one.textContent);
    seen.ticks = [...document.querySelectorAll('#heat .ytick text')].map(one => one.textContent);
    seen.title = document.title;
    """
    seen = browse(out, tmp_path / "place", steps)
    assert set(seen["cells"]) == {*HOSTILE, "x"}
    assert {f"encoder={name}, beta=1.0" for name in HOSTILE} <= set(seen["legend"])
    assert set(seen["ticks"]) == {*HOSTILE, "x"}
    assert seen["title"] == "test/bpd: model/encoder, model.beta"


def test_a_page_without_any_figure_loads(tmp_path):
    write_run(tmp_path / "runs" / "a")
    assert browse(compare(tmp_path / "out", tmp_path / "runs"), tmp_path / "place", SORTING)["byKey"] is not None


@pytest.mark.parametrize(
    "what", ['<img src="http://127.0.0.1:9/x.png">', "<script>nothing()</script>", "<script>fetch('/x')</script>"]
)
def test_what_these_tests_forbid_would_be_seen(what, tmp_path):
    (tmp_path / "comparison.html").write_text(f"<!doctype html><html><head><title>x</title></head><body>{what}</body></html>\n")
    with pytest.raises(AssertionError, match=r"errors|refused|asked|CONSOLE"):
        browse(tmp_path, tmp_path / "place", "")
