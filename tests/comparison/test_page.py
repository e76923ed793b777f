"""The page as text: whole, one file, without addresses of elsewhere, and safe against names that look like markup."""

import base64
import html
import json
import re
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from comparison.collect import collect
from comparison.figures import COLOURS, FEW, figures, look, ordered, positive, thin
from comparison.groups import group
from comparison.page import config_diffs
from tests.comparison.directories import compare, png, write_extras, write_run, write_sweep


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


def written(out):
    return (out / "comparison.html").read_text()


def data_of(text):
    return json.loads(re.search(r'id="figures">(.*?)</script>', text, re.DOTALL).group(1))


def groups_of(root, metric="test/bpd", by=None):
    return group(collect([str(root)])[0], by, metric)


def test_everything_asked_for_is_on_the_page(tmp_path):
    write_sweep(tmp_path / "sweep", extras=True)
    text = written(compare(tmp_path / "out", tmp_path / "sweep"))
    data = data_of(text)
    assert set(data) == {"curves", "levels", "rate", "heat"}
    assert [len(data[name]["data"]) for name in ("curves", "levels", "rate")] == [18, 6, 6]
    assert sum(line["showlegend"] for line in data["curves"]["data"]) == 6
    assert text.count("<details>") == 18
    pictures = re.findall(r'alt="samples" src="data:image/png;base64,([^"]+)"', text)
    kept = [(one.runs[0].path / "samples" / "final.png").read_bytes() for one in groups_of(tmp_path / "sweep")]
    assert [base64.b64decode(picture) for picture in pictures] == kept
    assert kept[0][:40] == png(0)[:40]


def test_no_address_leaves_the_page(tmp_path):
    write_sweep(tmp_path / "sweep", seeds=(0,), extras=True)
    text = written(compare(tmp_path / "out", tmp_path / "sweep"))
    own = text.replace(get_plotlyjs(), "")
    assert len(own) < len(text)
    assert "http" not in own
    assert "@import" not in own
    tags = Tags()
    tags.feed(own)
    addresses = [value for name, value in tags.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert addresses
    within = {f"#{value}" for name, value in tags.attributes if name == "id"}
    assert all(value.startswith("data:") or value in within for value in addresses)
    assert not {"iframe", "object", "embed", "base"} & set(tags.tags)


HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "\"'&amp;",
    "figures",
]


def test_hostile_names_are_text(tmp_path):
    for number, name in enumerate(HOSTILE):
        directory = write_run(tmp_path / "runs" / f"{number}", 2.0 + number, choices={"model/encoder": name}, extras=True)
        directory.rename(tmp_path / "runs" / name.replace("/", "_"))
    write_run(tmp_path / "runs" / "failed", status="failed", reason=HOSTILE[0])
    text = written(compare(tmp_path / "out", tmp_path / "runs"))
    own = text.replace(get_plotlyjs(), "")
    tags = Tags()
    tags.feed(own)
    assert tags.tags.count("script") == 3
    assert tags.tags.count("img") == len(HOSTILE)
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert "<!--" not in own
    assert own.count('id="figures"') == 1
    names = [line["name"] for line in data_of(text)["curves"]["data"]]
    assert [html.unescape(name) for name in names] == [f"encoder={name}" for name in HOSTILE]
    assert not any("<" in name for name in names)  # Plotly reads some markup in names


def test_only_figures_with_data_are_drawn(tmp_path):
    write_run(tmp_path / "runs" / "a")
    assert figures(groups_of(tmp_path / "runs"), "test/bpd") == {}
    text = written(compare(tmp_path / "out", tmp_path / "runs"))
    assert "<h2>Plots" not in text
    assert "<h2>Samples" not in text
    assert "<h2>Notes" not in text
    assert data_of(text) == {}


def test_a_group_keeps_its_legend_entry_if_its_first_run_left_nothing(tmp_path):
    for beta in (1.0, 2.0):
        for seed in range(3):
            directory = write_run(tmp_path / f"{beta}-{seed}", beta, seed, settings={"model.beta": beta})
            if seed:
                write_extras(directory, beta)
    made = figures(groups_of(tmp_path), "test/bpd")
    assert [line.showlegend for line in made["curves"].data] == [True, False, True, False]
    assert len({line.legendgroup for line in made["curves"].data}) == 2
    assert [line.showlegend for line in made["levels"].data] == [True, True]


def test_a_line_of_one_point_can_be_seen(tmp_path):
    write_extras(write_run(tmp_path / "vae"), 2.0, points=1, steps=1)
    made = figures(groups_of(tmp_path), "test/bpd")
    assert made["levels"].data[0].mode == made["curves"].data[0].mode == "lines+markers"
    write_extras(write_run(tmp_path / "ddpm", 3.0, choices={"model": "ddpm"}), 3.0, points=FEW + 1)
    assert [line.mode for line in figures(groups_of(tmp_path), "test/bpd")["curves"].data] == ["lines+markers", "lines"]


def test_a_search_over_two_numbers_is_drawn_as_points(tmp_path):
    for number in range(6):
        settings = {"model.optimizer.lr": 10.0**-number, "model.beta": 1.0 + number / 7}
        write_run(tmp_path / "numbers" / f"{number}", 2.0 + number, settings=settings)
    made = figures(groups_of(tmp_path / "numbers"), "test/bpd")["heat"]
    (drawn,) = made.data
    assert (drawn.type, len(drawn.x), list(drawn.marker.color)) == ("scatter", 6, [2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    assert (made.layout.xaxis.type, made.layout.yaxis.type) == ("log", "linear")
    for number in range(6):
        settings = {"model.optimizer.lr": f"{number}", "model.beta": number}
        write_run(tmp_path / "words" / f"{number}", 2.0 + number, settings=settings)
    assert "heat" not in figures(groups_of(tmp_path / "words"), "test/bpd")


def test_without_javascript_the_page_says_what_it_lacks(tmp_path):
    write_run(tmp_path / "runs" / "a", 2.0, extras=True)
    text = written(compare(tmp_path / "out", tmp_path / "runs"))
    assert re.search(r"<noscript>.*JavaScript.*</noscript>", text)


def test_costs_that_a_logarithm_cannot_show_are_said_to_be_left_out(tmp_path):
    directory = write_run(tmp_path / "a", 2.0, extras=True)
    assert "left out" not in figures(groups_of(tmp_path), "test/bpd")["levels"].layout.title.text
    (directory / "plots" / "kl_per_level.csv").write_text("t,nats\n1,0.5\n2,-0.25\n3,0.125\n")
    levels = figures(groups_of(tmp_path), "test/bpd")["levels"]
    assert list(levels.data[0].x) == [1, 3]
    assert levels.layout.title.text.endswith("; those of 0 or less are left out")


def test_continuous_data_has_curves_of_the_bound(tmp_path):
    directory = write_run(tmp_path / "a", 90.0, continuous=True)
    (directory / "metrics.csv").write_text("step,val/elbo\n1,-100\n2,-90\n")
    assert list(figures(groups_of(tmp_path, "test/elbo"), "test/elbo")) == ["elbo"]
    write_run(tmp_path / "b", 2.0, extras=True)
    made = figures(groups_of(tmp_path, "test/elbo"), "test/elbo")
    assert [len(made[name].data) for name in ("curves", "elbo")] == [1, 2]  # beside images with levels too


def test_many_groups_are_told_apart(tmp_path):
    for number in range(4 * len(COLOURS)):
        write_run(tmp_path / f"{number}", 2.0 + number, settings={"model.latent_dim": number}, extras=True)
    looks = {(line.line.color, line.line.dash) for line in figures(groups_of(tmp_path), "test/bpd")["curves"].data}
    assert len(looks) == 4 * len(COLOURS)


@pytest.mark.parametrize(("metric", "reversed_scale"), [("test/bpd", True), ("test/elbo", False)])
def test_the_heat_map_has_numbers_in_order_and_gaps_where_nothing_ran(metric, reversed_scale, tmp_path):
    figure = {}
    for dim in (2, 10, 100):
        for beta in (0.5, 1.0):
            if (dim, beta) != (10, 1.0):
                figure[beta, dim] = dim + beta
                write_run(tmp_path / f"{dim}{beta}", dim + beta, settings={"model.latent_dim": dim, "model.beta": beta})
    made = figures(groups_of(tmp_path, metric), metric)["heat"]
    (heat,) = made.data
    assert list(heat.x) == ["2", "10", "100"]
    assert list(heat.y) == ["0.5", "1.0"]
    assert heat.z[1][1] is None
    assert heat.reversescale is reversed_scale
    if metric == "test/bpd":
        assert heat.z[0][2] == figure[0.5, 100]


def test_three_settings_and_pooled_groups_have_no_heat_map(tmp_path):
    write_sweep(tmp_path, extras=True)
    assert "heat" not in figures(groups_of(tmp_path, by=["model/schedule"]), "test/bpd")
    assert "heat" not in figures(groups_of(tmp_path, by=["model/schedule", "model/weighting", "seed"]), "test/bpd")


def test_config_diffs_name_what_most_runs_do_not_have(tmp_path):
    for number in range(5):
        settings = {"model.beta": 4.0, "model.extra": "<b>"} if number == 3 else None
        write_run(tmp_path / f"r{number}", settings=settings)
    text = config_diffs(group(collect([str(tmp_path)])[0], ["data"], "test/bpd"))
    blocks = re.findall(r"<summary>(.*?)</summary><pre>(.*?)</pre>", text, re.DOTALL)
    assert len(blocks) == 5
    assert blocks[3][1] == "model.beta: 4.0\nmodel.extra: &#x27;&lt;b&gt;&#x27;"
    assert {block for _, block in blocks[:3]} == {"as most runs"}


def test_learning_curves_change_to_images_seen_where_all_runs_counted_them(tmp_path):
    for number in range(2):
        write_run(tmp_path / f"r{number}", settings={"model.beta": 1.0 + number}, extras=True)
    line = figures(groups_of(tmp_path), "test/bpd")["curves"]
    assert line.layout.meta == "images seen"
    assert [list(one.meta) for one in line.data] == [[128 * x for x in one.x] for one in line.data]
    path = tmp_path / "r1" / "metrics.csv"
    path.write_text(path.read_text().replace("images_seen", "something"))
    assert figures(groups_of(tmp_path), "test/bpd")["curves"].layout.meta is None


@pytest.mark.parametrize(("continuous", "names"), [(False, ["curves", "levels", "rate"]), (True, ["elbo", "levels", "rate"])])
def test_each_run_is_read_once_for_all_of_its_curves(continuous, names, tmp_path, monkeypatch):
    for number in range(2):
        path = write_run(tmp_path / f"r{number}", seed=number, continuous=continuous, extras=True) / "metrics.csv"
        if continuous:
            path.write_text(path.read_text().replace("val/bpd", "val/rmse"))
    groups, usual, opened = groups_of(tmp_path, "test/elbo"), Path.open, []
    monkeypatch.setattr(Path, "open", lambda path, *args, **settings: opened.append(path) or usual(path, *args, **settings))
    assert list(figures(groups, "test/elbo")) == names
    assert sorted(path.parent.name for path in opened if path.name == "metrics.csv") == ["r0", "r1"]


def test_small_helpers():
    x = list(range(1001))
    kept, same = thin(x, x, most=50)
    assert len(kept) == 50
    assert kept == same
    assert (kept[0], kept[-1]) == (0, 1000)
    assert thin([1, 2], [3, 4]) == ([1, 2], [3, 4])
    assert positive([1, 2, 3, 4], [1.0, 0.0, -1.0, float("nan")]) == ([1], [1.0])
    assert ordered([10, 2, "b", None, 0.5, "a", 2]) == ["0.5", "2", "10", "a", "b", "–"]


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(
        w * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4)
        for w, c in zip((0.2126, 0.7152, 0.0722), channels, strict=True)
    )


@pytest.mark.parametrize("back", ["#ffffff", "#15181d"])
def test_lines_stand_out_in_light_and_dark(back):
    for colour in COLOURS:
        one, other = sorted((luminance(colour), luminance(back)))
        assert (other + 0.05) / (one + 0.05) > 2.9, colour


def seen_without_red_or_green(colour):
    """What linear RGB becomes for people without red and without green cones (Machado et al. 2009), in CIE Lab."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    red = [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]]
    green = [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]]
    for matrix in (red, green):
        xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ np.clip(
            np.array(matrix) @ linear, 0, 1
        )
        x, y, z = np.cbrt(xyz / (0.9505, 1, 1.089))
        yield np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_groups_of_one_dash_have_colours_that_the_colour_blind_tell_apart():
    for first, second in combinations(range(2 * len(COLOURS)), 2):  # forty pairs want each dash for all ten colours
        (one, dash), (other, other_dash) = look(first), look(second)
        if dash == other_dash:
            pairs = zip(seen_without_red_or_green(one), seen_without_red_or_green(other), strict=True)
            assert min(np.linalg.norm(a - b) for a, b in pairs) > 6, (one, other)
