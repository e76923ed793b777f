"""Run directories are found under whatever names them; what is no run is named and skipped, and never ends a comparison."""

import json
import os

import pytest

import comparison.groups
from comparison.collect import collect, curve, evaluated, level_kls, rate_distortion, read_run
from runs.build import SettingError
from tests.comparison.directories import NATS, write_extras, write_run, write_sweep


def found(*patterns):
    runs, skipped = collect([str(pattern) for pattern in patterns])
    return sorted(run.name for run in runs), skipped


def test_a_run_a_sweep_a_glob_and_a_list_of_them(tmp_path, monkeypatch):
    names = {f"s{seed}" for seed in range(3)}
    for seed in range(3):
        write_run(tmp_path / "one" / f"s{seed}", seed=seed)
    write_run(tmp_path / "two" / "day" / "t", seed=7)
    (tmp_path / "one" / "train.log").write_text("x")
    (tmp_path / "one" / "multirun.yaml").write_text("hydra: {}")
    assert found(tmp_path / "one" / "s1") == (["s1"], [])
    assert found(tmp_path / "one") == (sorted(names), [])
    assert found(tmp_path / "one" / "*") == (sorted(names), [])
    assert found(tmp_path / "*") == (["s0", "s1", "s2", "t"], [])
    assert found(tmp_path / "two", tmp_path / "one" / "s[02]") == (["s0", "s2", "t"], [])
    monkeypatch.chdir(tmp_path)
    assert found("one", "./one/../one", tmp_path / "one" / "s0") == (sorted(names), [])  # each run once


def test_a_directory_whose_name_looks_like_a_glob(tmp_path):
    write_run(tmp_path / "a[1]" / "s0")
    assert found(tmp_path / "a[1]") == (["s0"], [])


def test_what_matches_nothing_or_holds_nothing_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.yaml").write_text("[1, 2")
    for pattern, sentence in (
        ("nowhere*", "matches nothing"),
        ("empty", "holds no run"),
        ("bad", "config.yaml cannot be read"),
    ):
        with pytest.raises(SettingError, match=sentence) as error:
            collect([str(tmp_path / pattern)])
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500
    with pytest.raises(SettingError, match="holds no run"):
        collect([])


def test_failed_unfinished_and_retried_jobs_say_so(tmp_path):
    write_run(tmp_path / "done")
    write_run(tmp_path / "failed", status="failed", reason="SettingError: training\ndiverged")
    write_run(tmp_path / "running", status="running")
    write_run(tmp_path / "early", status="failed", reason="refused")
    (tmp_path / "early" / "config.yaml").unlink()
    write_run(tmp_path / "alone", status="running")
    (tmp_path / "alone" / "job.json").unlink()
    write_run(tmp_path / "done-before-1")
    write_run(tmp_path / "only-before-1")
    runs, skipped = collect([str(tmp_path)])
    assert {run.name: run.reason for run in runs} == {
        "alone": "unfinished",
        "done": "",
        "early": "failed: refused",
        "failed": "failed: SettingError: training diverged",
        "only-before-1": "",
        "running": "unfinished",
    }
    assert skipped == [f"{tmp_path / 'done-before-1'}: an earlier try of done"]
    assert found(tmp_path / "done-before-1") == (["done-before-1"], [])  # asked for by name


CORRUPT = {
    "truncated result": ("result.json", b'{"metrics": {"test/bpd": 2.'),
    "empty result": ("result.json", b""),
    "list result": ("result.json", b"[1, 2]"),
    "number result": ("result.json", b"3"),
    "metrics are a list": ("result.json", b'{"metrics": [1]}'),
    "no metrics": ("result.json", b"{}"),
    "costs are a list": ("result.json", b'{"metrics": {}, "costs": [1]}'),
    "a cost is a number": ("result.json", b'{"metrics": {}, "costs": {"elbo": 1}}'),
    "seconds are a word": ("result.json", b'{"metrics": {}, "seconds": "long"}'),
    "a word for a number": ("result.json", b'{"metrics": {"test/bpd": 1.0}, "parameters": "many"}'),
    "choices are a list": ("result.json", b'{"metrics": {}, "choices": [1]}'),
    "nested too deep": ("result.json", b"[" * 100_000),
    "garbage result": ("result.json", bytes(range(256))),
    "truncated config": ("config.yaml", b"model:\n  _target_: x\n  betas: [0.9,"),
    "cut in a key": ("config.yaml", b"model:\n  _target_: x\n  bet"),
    "empty config": ("config.yaml", b""),
    "list config": ("config.yaml", b"- 1\n- 2\n"),
    "word config": ("config.yaml", b"hello"),
    "config of something else": ("config.yaml", b"model: resnet\ndata: {}\n"),
    "config of W&B": ("config.yaml", b"model:\n  value: {_target_: x}\ndata:\n  value: {_target_: y}\n"),
    "config that runs code": ("config.yaml", b"model: !!python/object/apply:os.system [exit 3]\n"),
    "config that holds itself": ("config.yaml", b"data: {_target_: y}\nmodel: &a\n  _target_: x\n  b: *a\n"),
    "garbage config": ("config.yaml", bytes(range(256))),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_what_cannot_be_read_is_named_with_its_file_and_skipped(name, tmp_path):
    write_run(tmp_path / "good")
    file, content = CORRUPT[name]
    (write_run(tmp_path / "bad") / file).write_bytes(content)
    names, skipped = found(tmp_path)
    assert names == ["good"]
    assert len(skipped) == 1
    assert skipped[0].startswith(f"{tmp_path / 'bad'}: ")
    assert "\n" not in skipped[0]
    if name not in ("nested too deep", "config that holds itself"):
        assert file in skipped[0]


def test_directories_where_files_should_be_missing_files_and_foreign_directories(tmp_path):
    write_run(tmp_path / "good")
    (tmp_path / "odd" / "config.yaml").mkdir(parents=True)
    lost = write_run(tmp_path / "lost")
    (lost / "config.yaml").unlink()
    (lost / "job.json").unlink()
    broken = write_run(tmp_path / "broken", status="running")
    (broken / "job.json").write_text("[")
    nothing = write_run(tmp_path / "nothing", status="failed")
    (nothing / "config.yaml").unlink()
    (nothing / "job.json").write_text("{}")
    (tmp_path / "photos").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    names, skipped = found(tmp_path / "*")
    assert names == ["good"]
    assert {line.split(":")[0].rsplit("/", 1)[1] for line in skipped} == {"odd", "lost", "broken", "nothing", "photos"}
    assert f"{lost}: config.yaml is missing" in skipped


def test_a_result_counts_whatever_job_json_says(tmp_path):
    (write_run(tmp_path / "run") / "job.json").write_bytes(b"\xff\xfe")
    assert read_run(tmp_path / "run").metric("test/bpd") == 2.0


def test_curves_kls_and_rates_are_read(tmp_path):
    directory = write_run(tmp_path / "run", 2.0)
    run = read_run(directory)
    assert curve(run, "val/bpd") == level_kls(run) == rate_distortion(run) == ([], [])
    write_extras(directory, 2.0, points=3, steps=20)
    run = read_run(directory)
    steps, values = curve(run, "val/bpd")
    assert steps == [10, 20, 30]
    assert values[0] == 3.0
    assert curve(run, "val/nope") == ([], [])
    assert level_kls(run)[0] == list(range(1, 21))
    assert level_kls(run)[1][0] == 60.0
    rate, error = rate_distortion(run)
    assert rate[0] == pytest.approx(1.8 * 0.9)
    assert len(rate) == len(error) == 4


def test_an_evaluation_of_other_weights_is_not_the_runs(tmp_path):
    directory = write_run(tmp_path / "run", extras=True)
    for name, step in (("evaluation.json", {"step": 20}), ("result.json", {"tested_step": 20})):
        record = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(record | step))
    assert rate_distortion(read_run(directory)) != ([], [])
    (directory / "result.json").write_text(json.dumps(record | {"tested_step": 30}))
    assert rate_distortion(read_run(directory)) == ([], [])


def write_evaluation(directory, bits, tested=180, **other):
    """Writes what evaluate.py leaves of a run's tested weights."""
    term = {"nats": {"mean": bits * NATS}, "bits_per_dim": {"mean": bits}}
    own = {"terms": {"prior": term, "elbo": term}, "num_images": tested}
    data = {"dataset": "digits", "num_test": 180, "image_shape": [1, 8, 8]}
    record = {"split": "test", "seed": 0, "data": data, "results": {"ema": own}}
    (directory / "evaluation.json").write_text(json.dumps(record | other))


def test_an_evaluation_takes_the_place_of_a_runs_own_test(tmp_path):
    directory = write_run(tmp_path / "run", 2.0)
    assert evaluated(read_run(directory)).result["metrics"] == {}
    write_evaluation(directory, 1.75)
    found = evaluated(read_run(directory))
    assert found.result["metrics"] == {"evaluation/prior": 1.75 * NATS, "evaluation/elbo": -1.75 * NATS, "evaluation/bpd": 1.75}
    assert found.result["costs"]["prior"] == {"nats": 1.75 * NATS, "bits_per_dim": 1.75}
    assert read_run(directory).metric("test/bpd") == 2.0
    for other in ({"split": "val"}, {"results": {"raw": {}}}, {"data": None}):
        write_evaluation(directory, 1.75, **other)
        assert evaluated(read_run(directory)).result["metrics"] == {}


def test_evaluations_of_some_images_are_of_the_same_ones_with_the_same_seed(tmp_path):
    directory, kinds = write_run(tmp_path / "run"), []
    for tested, seed in ((180, 0), (180, 1), (40, 0), (40, 1)):
        write_evaluation(directory, 1.75, tested, seed=seed)
        kinds.append(comparison.groups.tested_on(evaluated(read_run(directory))))
    assert kinds[0] == kinds[1]
    assert len(set(kinds)) == 3
    assert kinds[2][1] == "digits (40 of 180 images, 1x8x8)"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\1\2" * 50,
        bytes(range(256)) * 4,
        b"val/bpd,nats,t\nx,y,z\n",
        b"val/bpd\n1.0\n",
        b"step,val/bpd,t,nats\n1.5.2,2,a,b\n",
        b"step,val/bpd,t,nats\n" + b"1" * 200_000,
        b'step,val/bpd,t,nats\n"' + b"1" * 200_000,
    ],
    ids=range(8),
)
def test_broken_curves_are_no_curves(content, tmp_path):
    directory = write_run(tmp_path / "run", extras=True)
    for name in ("metrics.csv", "plots/kl_per_level.csv"):
        (directory / name).write_bytes(content)
    run = read_run(directory)
    assert curve(run, "val/bpd") == level_kls(run) == ([], [])


@pytest.mark.parametrize(
    "record",
    [[], 1, {}, {"results": {}}, {"results": []}, {"results": {"ema": []}}, {"results": {"ema": {"bpd": 1}}},
     {"results": {"ema": {"steps": {"rate_bits_per_dim": [None], "rmse_levels": [1]}}}}],
)  # fmt: skip
def test_broken_evaluations_have_no_rate(record, tmp_path):
    directory = write_run(tmp_path / "run", extras=True)
    (directory / "evaluation.json").write_text(json.dumps(record))
    assert rate_distortion(read_run(directory)) == ([], [])
    assert evaluated(read_run(directory)).result["metrics"] == {}


def test_images_per_second_are_those_of_all_sessions(tmp_path):
    assert read_run(write_run(tmp_path / "one")).images_per_second == 22 * 128 / 2.0
    four = write_run(tmp_path / "four", settings={"trainer.accumulate_grad_batches": 4})
    record = json.loads((four / "result.json").read_text())
    for change, expected in (
        ({"images_seen": 5000, "step": 7}, 2500.0),  # went on with other batches: what was counted goes
        ({"images_seen": None}, 4 * 22 * 128 / 2.0),
        ({"seconds": {"train": 0}}, None),
        ({"seconds": {}}, None),
        ({"seconds": {"train": None}}, None),
    ):
        (four / "result.json").write_text(json.dumps({**record, **change}))
        assert read_run(four).images_per_second == expected


def test_two_hundred_runs(tmp_path):
    for number in range(34):
        write_sweep(tmp_path / f"{number}", seeds=(number,))
    names, skipped = found(tmp_path)
    assert len(names) == len(os.listdir(tmp_path)) * 6 == 204
    assert skipped == []
