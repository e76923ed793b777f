"""The whole of a comparison: real jobs, the three files, what is left out, and nothing on disk is overwritten."""

import csv
import errno
import html
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from rich.console import Console
from scipy import stats

from comparison.collect import collect, rate_distortion, read_run
from comparison.groups import group
from comparison.job import run
from comparison.tables import rows, terminal
from runs.build import SettingError, flatten
from tests.comparison.directories import compare, write_run, write_sweep
from tests.evaluation.evaluations import evaluate_here
from tests.jobs import ROOT, SMALL_DDPM, result, run_here


def table_of_csv(out):
    """A row for each group, numbers as they stand."""
    with (out / "comparison.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def table_of_markdown(out):
    lines = [line for line in (out / "comparison.md").read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [[html.unescape(cell) for cell in row] for row in [rows[0], *rows[2:]]]


def table_of_page(out):
    text = (out / "comparison.html").read_text()
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", text[: text.index("</table>")])
    cells = [[re.sub(r"</?a[^>]*>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]
    return [[html.unescape(cell) for cell in row] for row in cells]


def keys(value):
    return {key for key, _ in flatten(value, "")}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Two tiny VAEs, and an evaluated DDPM."""
    root = tmp_path_factory.mktemp("real")
    for dim in (2, 4):
        run_here(root / f"vae{dim}", "model=vae", f"model.latent_dim={dim}", "logger=csv")
    run_here(root / "ddpm", *SMALL_DDPM, "logger=csv", "trainer.max_epochs=1")
    evaluate_here(root / "ddpm" / "run", "replicates=2", "max_images=8", "pictures=false")
    return root


def test_real_jobs_are_compared(real, tmp_path, capsys):
    out = compare(tmp_path / "out", real / "vae*")
    rows = table_of_csv(out)
    results = {str(dim): result(real / f"vae{dim}" / "run") for dim in (2, 4)}
    assert {row["model.latent_dim"] for row in rows} == set(results)
    for row in rows:
        own = results[row["model.latent_dim"]]
        assert (row["metric"], row["n"], row["sd"], row["unit"]) == ("test/bpd", "1", "", "bits_per_dim")
        assert float(row["mean"]) == own["metrics"]["test/bpd"]  # every digit
        assert float(row["prior"]) == own["costs"]["prior"]["bits_per_dim"]
        assert float(row["parameters"]) == own["parameters"]
        assert float(row["images_per_second"]) == own["images_seen"] / own["seconds"]["train"]
    text = (out / "comparison.html").read_text()
    assert '<button id="axis"' in text
    assert text.count("<img ") == 2
    assert '"curves"' in text
    assert '"levels"' in text
    assert "latent_dim" in capsys.readouterr().out


def test_the_bound_in_bits_is_the_sum_of_the_terms_printed(real, tmp_path):
    for row in table_of_markdown(compare(tmp_path / "out", real / "vae*"))[1:]:
        assert float(row[2]) == pytest.approx(sum(map(float, row[5:8])), abs=3e-4)


def test_runs_written_by_hand_are_like_real_ones(real, tmp_path):
    hand = write_run(tmp_path / "hand", extras=True)
    own = real / "vae2" / "run"
    for name, load in (("config.yaml", yaml.safe_load), ("result.json", json.loads)):
        wanted, there = (keys(load((place / name).read_text())) for place in (hand, own))
        assert wanted <= there, wanted - there
    for name in ("metrics.csv", "plots/kl_per_level.csv"):
        wanted, there = ((place / name).read_text().splitlines()[0].split(",") for place in (hand, own))
        assert set(wanted) <= set(there)
    assert read_run(own).choices == read_run(hand).choices
    assert (own / "samples" / "final.png").read_bytes()[:8] == (hand / "samples" / "final.png").read_bytes()[:8]
    wanted, there = (json.loads((place / "evaluation.json").read_text())["results"] for place in (hand, real / "ddpm" / "run"))
    assert wanted.keys() == there.keys()
    assert wanted["ema"].keys() <= there["ema"].keys()
    assert wanted["ema"]["steps"].keys() == there["ema"]["steps"].keys()
    assert len(rate_distortion(read_run(real / "ddpm" / "run"))[0]) > 2


def test_evaluations_are_compared_where_they_are_asked_for(real, tmp_path, capsys):
    evaluation = json.loads((real / "ddpm" / "run" / "evaluation.json").read_text())
    terms = evaluation["results"]["ema"]["terms"]
    (row,) = table_of_csv(compare(tmp_path / "bits", real / "ddpm", real / "vae2", metric="evaluation/bpd"))
    assert float(row["mean"]) == evaluation["bpd"]
    assert float(row["matching"]) == terms["matching"]["bits_per_dim"]["mean"]
    printed = capsys.readouterr().out
    assert f"no finite evaluation/bpd (python evaluate.py run=RUN leaves one): {real / 'vae2'}" in printed
    (row,) = table_of_csv(compare(tmp_path / "nats", real / "ddpm", metric="evaluation/elbo"))
    assert float(row["mean"]) == -terms["elbo"]["nats"]["mean"]
    with pytest.raises(SettingError, match=r"no run here has an evaluation .*evaluate.py run=RUN"):
        compare(tmp_path / "none", real / "vae*", metric="evaluation/bpd")
    with pytest.raises(SettingError, match=r"metric=evaluation/bdp is in none of these runs: choose among .*evaluation/bpd"):
        compare(tmp_path / "none", real / "ddpm", metric="evaluation/bdp")


def test_a_ddpm_beside_a_vae_differs_by_its_model_alone(real, tmp_path):
    assert table_of_markdown(compare(tmp_path / "out", real / "ddpm", real / "vae2"))[0][:2] == ["model", "trainer.max_epochs"]


def test_the_three_files_hold_one_table(tmp_path, capsys):
    figures = write_sweep(tmp_path / "sweep")
    out = compare(tmp_path / "out", tmp_path / "sweep")
    head, *rows = table_of_markdown(out)
    assert table_of_page(out) == [head, *rows]
    assert head == [
        "model/schedule", "model/weighting", "runs", "test/bpd", "sd", "difference ± 95%", "reconstruction (bits/dim)",
        "prior (bits/dim)", "matching (bits/dim)", "parameters", "seconds", "images/s",
    ]  # fmt: skip
    assert [float(row[3]) for row in rows] == sorted(float(row[3]) for row in rows)
    assert rows[0][5] == "best"
    printed = capsys.readouterr().out
    assert " schedule ┃ weighting ┃ runs " in printed
    for row in rows:
        own = [figures[row[0], row[1], seed] for seed in range(3)]
        assert row[3:5] == [f"{np.mean(own):.4f}", f"{np.std(own, ddof=1):.4f}"]
        assert float(row[6]) == pytest.approx(0.9 * np.mean(own), abs=5e-5)
        assert row[2] == "3"
        assert row[9:] == ["316,548", "4", "1,408"]
        assert all(cell in printed for cell in row)


@pytest.mark.parametrize(("width", "columns"), [(60, 6), (80, 6), (100, 8), (120, 10), (200, 12)])
def test_a_terminal_gets_the_columns_that_it_has_room_for_and_whole_numbers(width, columns, tmp_path):
    write_sweep(tmp_path / "sweep")
    groups = group(collect([str(tmp_path / "sweep")])[0], None, "test/bpd")
    console = Console(width=width, file=io.StringIO())
    console.print(terminal(groups, "test/bpd", console))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    printed = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines if line[0] in "│┃"]
    assert {len(row) for row in printed} == {columns}
    numbers = [row[2:columns] for row in rows(groups)]
    assert [row[2:] for row in printed if row[2] == "3"] == numbers


def test_many_settings_share_a_column_where_a_terminal_would_leave_none_of_their_letters(tmp_path):
    for seed, value in enumerate(("one", "two")):
        varied = {f"model.setting_{number}": value for number in range(11)}
        write_run(tmp_path / str(seed), 2.0 + seed, 0, {}, varied)
    groups = group(collect([str(tmp_path)])[0], None, "test/bpd")
    assert groups[0].values.keys() == varied.keys()
    console = Console(width=60, file=io.StringIO())
    console.print(terminal(groups, "test/bpd", console))
    printed = console.file.getvalue()
    assert max(map(len, printed.splitlines())) <= 60
    for value, figure in (("one", "2.0000"), ("two", "3.0000")):
        assert figure in printed
        assert all(f"setting_{number}={value}" in re.sub(r"[^\w=]", "", printed) for number in range(11))


def test_the_csv_holds_numbers_alone_and_all_their_digits(tmp_path):
    figures = write_sweep(tmp_path / "sweep")
    best, *others = table_of_csv(compare(tmp_path / "out", tmp_path / "sweep"))

    def own(row):
        return np.array([figures[row["model/schedule"], row["model/weighting"], seed] for seed in range(3)])

    assert [best[name] for name in ("difference", "ci_low", "ci_high", "common_seeds")] == [""] * 4
    for row in (best, *others):
        numbers = {name: row[name] for name in row if name not in ("model/schedule", "model/weighting", "metric", "unit")}
        assert all(number in (repr(float(number)), str(int(float(number)))) for number in numbers.values() if number)
        assert float(row["mean"]) == pytest.approx(own(row).mean(), rel=1e-15)
        assert float(row["sd"]) == pytest.approx(own(row).std(ddof=1), rel=1e-14)
        assert (row["n"], row["images_per_second"]) == ("3", "1408.0")
    for row in others:
        pairs = own(row) - own(best)
        half = stats.t.ppf(0.975, 2) * pairs.std(ddof=1) / math.sqrt(3)
        expected = (pairs.mean(), pairs.mean() - half, pairs.mean() + half, 3)
        found = [float(row[name]) for name in ("difference", "ci_low", "ci_high", "common_seeds")]
        assert found == pytest.approx(expected, rel=1e-9)


def test_by_and_metric_choose(tmp_path):
    write_sweep(tmp_path / "sweep")
    out = compare(tmp_path / "out", tmp_path / "sweep", by="model/schedule", metric="test/matching")
    head, *rows = table_of_markdown(out)
    assert head[:3] == ["model/schedule", "runs", "test/matching"]
    assert [row[1] for row in rows] == ["6", "6", "6"]
    pooled = "not in by=, so means are over runs that differ in it: model/weighting"
    assert all(pooled in (out / f"comparison.{ending}").read_text() for ending in ("md", "html"))
    out = compare(tmp_path / "two", tmp_path / "sweep", by=["model/weighting", "model/schedule"])
    assert "not in by=" not in (out / "comparison.md").read_text()
    assert table_of_markdown(out)[0][:2] == ["model/weighting", "model/schedule"]


def test_what_is_left_out_is_listed_everywhere(tmp_path, capsys):
    write_sweep(tmp_path / "sweep", seeds=(0,))
    write_run(tmp_path / "sweep" / "failed", status="failed", reason="diverged | <b>")
    write_run(tmp_path / "sweep" / "unfinished", status="running")
    write_run(tmp_path / "sweep" / "nothing", float("nan"))
    write_run(tmp_path / "sweep" / "too much", float("inf"))
    (write_run(tmp_path / "sweep" / "corrupt") / "result.json").write_text("{")
    out = compare(tmp_path / "out", tmp_path / "sweep")
    assert len(table_of_markdown(out)) == 7
    texts = [capsys.readouterr().out, (out / "comparison.md").read_text(), html.unescape((out / "comparison.html").read_text())]
    for text in texts:
        for line in (
            f"failed: diverged | <b>: {tmp_path}/sweep/failed",
            f"unfinished: {tmp_path}/sweep/unfinished",
            f"no finite test/bpd: {tmp_path}/sweep/nothing",
            f"no finite test/bpd: {tmp_path}/sweep/too much",
            f"skipped: {tmp_path}/sweep/corrupt: result.json cannot be read",
        ):
            assert line in text


def test_figures_that_are_missing_or_not_finite_leave_empty_cells(tmp_path):
    directory = write_run(tmp_path / "runs" / "a", extras=True)
    record = json.loads((directory / "result.json").read_text())
    record["costs"]["prior"] = {"nats": float("nan"), "bits_per_dim": float("nan")}
    del record["costs"]["matching"], record["parameters"], record["seconds"]
    (directory / "result.json").write_text(json.dumps(record))
    (directory / "metrics.csv").write_text("step,val/bpd\n1,nan\n2,inf\n3,2.0\n")
    (directory / "plots" / "kl_per_level.csv").write_text("t,nats\n1,nan\n2,0\n3,-1\n4,2.5\n")
    out = compare(tmp_path / "out", tmp_path / "runs")
    assert table_of_markdown(out)[1][-6:] == ["1.8000", "nan", "", "", "", ""]
    (row,) = table_of_csv(out)
    assert {name for name in row if row[name] == ""} >= {"prior", "matching", "parameters", "seconds", "images_per_second"}
    data = re.search(r'id="figures">(.*?)</script>', (out / "comparison.html").read_text(), re.DOTALL).group(1)
    json.loads(data, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_continuous_data_is_compared_in_nats(tmp_path, capsys):
    for beta in (1.0, 2.0):
        write_run(tmp_path / "runs" / f"{beta}", 90.0 + beta, settings={"model.beta": beta}, continuous=True)
    with pytest.raises(SettingError, match=r"metric=test/bpd is in none.*test/elbo"):
        compare(tmp_path / "out", tmp_path / "runs")
    assert not (tmp_path / "out").exists()
    out = compare(tmp_path / "out", tmp_path / "runs", metric="test/elbo")
    head, *rows = table_of_markdown(out)
    assert [row[0] for row in rows] == ["1.0", "2.0"]
    assert rows[1][4] == "-1.0000"
    assert "prior (nats)" in head
    assert float(rows[0][head.index("prior (nats)")]) == pytest.approx(0.02 * 91)
    assert "costs in nats" in capsys.readouterr().out


def test_terms_of_pixels_and_continuous_data_have_one_unit(tmp_path):
    write_run(tmp_path / "runs" / "pixels", 2.0)
    write_run(tmp_path / "runs" / "continuous", 100.0, continuous=True, choices={"data": "gaussian"})
    head, *rows = table_of_markdown(compare(tmp_path / "out", tmp_path / "runs", metric="test/elbo"))
    column = head.index("prior (nats)")
    assert {row[0]: float(row[column]) for row in rows} == {"digits": pytest.approx(1.7745, abs=1e-4), "gaussian": 2.0}


def test_nothing_on_disk_is_overwritten(tmp_path, monkeypatch, capsys):
    write_sweep(tmp_path / "sweep", seeds=(0,))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for _ in range(3):
        compare(tmp_path / "out", tmp_path / "sweep")
        after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert before.items() <= after.items()
        assert len(after) == len(before) + 3
        before = after
    assert f"{tmp_path}/out-3/comparison.html" in capsys.readouterr().out
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "comparison.md").write_text("mine")
    compare(tmp_path / "mine", tmp_path / "sweep")
    assert (tmp_path / "mine" / "comparison.md").read_text() == "mine"
    assert (tmp_path / "mine-2" / "comparison.md").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SettingError, match="out="):
        compare(tmp_path / "file", tmp_path / "sweep")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        compare(".", tmp_path / "sweep")
    assert (tmp_path / "comparison-2" / "comparison.html").exists()


@pytest.mark.parametrize("end", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_one_that_is_cut_short_leaves_no_empty_page_and_its_name_is_free(end, tmp_path, monkeypatch):
    write_run(tmp_path / "runs" / "0", 2.0)

    def cut_short(self, text, **_):
        if "comparison.md" in self.name:
            raise end
        return self.write_bytes(text.encode())

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", cut_short)
        with pytest.raises(type(end)):
            compare(tmp_path / "out", tmp_path / "runs")
    assert not list((tmp_path / "out").iterdir())
    compare(tmp_path / "out", tmp_path / "runs")
    assert (tmp_path / "out" / "comparison.html").stat().st_size


def test_that_groups_have_other_seeds_is_said(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path / "runs" / f"a{seed}", 2.0 + seed, seed, choices={"model/encoder": "a"})
        write_run(tmp_path / "runs" / f"b{seed}", 2.1 + seed, seed, choices={"model/encoder": "b"})
    compare(tmp_path / "same", tmp_path / "runs")
    assert "the seeds differ" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "runs" / "b1")  # b now looks better than a, by its seed alone
    out = compare(tmp_path / "other", tmp_path / "runs")
    assert "the seeds differ: rows stand by the means over all their runs" in capsys.readouterr().out
    assert all("the seeds differ" in (out / f"comparison.{ending}").read_text() for ending in ("html", "md"))


def test_several_runs_of_one_seed_in_a_row_are_said(tmp_path, capsys):
    for name, seed in (("first", 0), ("other", 1)):
        write_run(tmp_path / "runs" / name, 2.0 + seed, seed)
    compare(tmp_path / "seeds", tmp_path / "runs")
    assert "several runs of one seed" not in capsys.readouterr().out
    write_run(tmp_path / "runs" / "again", 2.5, 1)
    compare(tmp_path / "repeated", tmp_path / "runs")
    assert "some rows have several runs of one seed, so their sd is not one over seeds" in capsys.readouterr().out


def test_comparisons_that_start_at_once_are_all_kept(tmp_path):
    write_run(tmp_path / "runs" / "0", 2.0)
    write_run(tmp_path / "runs" / "1", 2.1)
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda _: compare(tmp_path / "out", tmp_path / "runs"), range(24)):
            pass
    made = sorted(tmp_path.glob("out*"))
    assert len(made) == 24
    assert all((one / f"comparison.{ending}").stat().st_size for one in made for ending in ("html", "csv", "md"))


def test_hostile_names_break_no_table(tmp_path, capsys):
    values = ["a|b", "[bold]x[/]", "[/oops]", "two\nlines", '<script>alert("x")</script>', 'comma, "quote"', "é ∑ 💥", "last"]
    for number, value in enumerate(values):
        write_run(tmp_path / "runs" / f"{number}", 2.0 + number, choices={"model/encoder": value})
    out = compare(tmp_path / "out", tmp_path / "runs")
    assert [row["model/encoder"] for row in table_of_csv(out)[:-1]] == values[:-1]
    assert [row[0] for row in table_of_markdown(out)[1:-1]] == [
        "two lines" if "\n" in value else value for value in values[:-1]
    ]
    printed = capsys.readouterr().out
    assert "[bold]x[/]" in printed
    assert "[/oops]" in printed


def test_two_hundred_runs_are_compared(tmp_path):
    for number in range(34):
        write_sweep(tmp_path / "runs" / f"{number}", seeds=(number,), extras=True)
    out = compare(tmp_path / "out", tmp_path / "runs")
    assert [row[2] for row in table_of_markdown(out)[1:]] == ["34"] * 6
    text = (out / "comparison.html").read_text()
    assert text.count("<details>") == 204
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.DOTALL).group(1))
    assert len(figures["curves"]["data"]) == 204
    assert len(figures["levels"]["data"]) == len(figures["rate"]["data"]) == 6


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"runs": "???"}, "runs= is missing"),
        ({"runs": ""}, "a name is empty"),
        ({"runs": "nowhere*"}, r"runs=nowhere\* matches nothing"),
        ({"runs": []}, "holds no run"),
        ({"by": "model/nope"}, "by=model/nope"),
        ({"metric": "test/nope"}, "metric=test/nope"),
        ({"metric": None}, "metric=None"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_sentence_and_leave_nothing(settings, sentence, tmp_path):
    write_run(tmp_path / "runs" / "a")
    cfg = {"runs": str(tmp_path / "runs"), "by": None, "metric": "test/bpd", "out": str(tmp_path / "out"), **settings}
    with pytest.raises(SettingError, match=sentence) as error:
        run(OmegaConf.create(cfg))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_runs_of_which_none_is_finished_are_refused(tmp_path):
    write_run(tmp_path / "runs" / "a", status="failed", reason="diverged")
    with pytest.raises(SettingError, match=r"none of the 1 runs is finished .*diverged"):
        compare(tmp_path / "out", tmp_path / "runs")


def test_the_command_compares_refuses_in_one_line_and_needs_no_torch(tmp_path):
    write_sweep(tmp_path / "sweep", seeds=(0, 1))

    def python(*arguments):
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    done = python(str(ROOT / "compare.py"), "runs=sweep", "by=[model/schedule]")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "best first" in done.stdout
    (made,) = (tmp_path / "outputs" / "comparisons").iterdir()
    assert {path.name for path in made.iterdir()} == {f"comparison.{ending}" for ending in ("csv", "md", "html")}
    assert {path.name for path in tmp_path.iterdir()} == {"outputs", "sweep"}
    write_run(tmp_path / "one", status="running").rename(tmp_path / os.fsdecode(b"sweep/\xe9"))  # a name that is no text
    done = python(str(ROOT / "compare.py"), "runs=sweep", "out=again")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"unfinished: sweep/\udce9" in done.stdout
    refused = python(str(ROOT / "compare.py"), "runs=nowhere")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: runs=nowhere matches nothing")
    assert refused.stderr.count("\n") == 1
    light = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import comparison.job; assert 'torch' not in sys.modules"
    assert python("-c", light).returncode == 0
