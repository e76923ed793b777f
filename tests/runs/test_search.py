"""A search that is started again: its trials are a total, and what was cut off waits to go on."""

import json
import re
import signal

import pytest
from omegaconf import OmegaConf

from runs.directory import hold, write_json
from runs.identity import job_name
from runs.search import go_on, other_study
from runs.sweep import SweepReport, run_in_sweep, run_sweep
from tests.jobs import QUICK, command, configure, result, run_here
from tests.runs.ranks import assert_ranks_agree
from tests.runs.sweeps import JOB, LONG, RANKS, checkpoints, start, sweeps, wandb_files
from tests.wandb_file import records


def test_spent_trials_count_and_cut_off_ones_wait_again_with_their_values(tmp_path):
    optuna = pytest.importorskip("optuna")
    storage = f"sqlite:///{tmp_path}/study.db"
    sweeper = OmegaConf.create({"_target_": "...optuna...", "storage": storage, "study_name": "sweep", "n_trials": 5})
    OmegaConf.set_readonly(sweeper, True)
    assert go_on(sweeper) == "search: 0 of 5 trials spent (0 failed), 0 interrupted, 5 to run"
    study = optuna.create_study(study_name="sweep", storage=storage)
    space = {"x": optuna.distributions.UniformDistribution(0.0, 1.0)}
    trials = [study.ask(space) for _ in range(3)]
    study.tell(trials[0], 1.0)
    study.tell(trials[1], state=optuna.trial.TrialState.FAIL)
    value = trials[2].params["x"]
    said = go_on(sweeper)
    assert said.splitlines()[0] == "search: 2 of 5 trials spent (1 failed), 1 interrupted, 3 to run"
    assert said.splitlines()[1] == f"  interrupted, goes on: trial 2  x={value}"
    assert sweeper.n_trials == 3
    again = optuna.load_study("sweep", storage).ask(space)
    assert (again.number, again.params["x"]) == (2, value)


@pytest.mark.parametrize(
    ("overrides", "direction", "words"),
    [
        (["model=vae,mhvae", "model.beta=interval(1,2)", "seed=1", "logger=csv"], "minimize", None),
        (["model=vae,mhvae", "model.beta=interval(0,9)", "seed=1"], "minimize", None),  # Optuna takes another interval
        (["model=vae,mhvae", "seed=1", "trainer.max_epochs=1,2"], "minimize", None),  # and one more setting
        (["model=vae,ddpm", "seed=1"], "minimize", "model: the study .* has searched other values, vae,mhvae; give another"),
        (["model.beta=1,2", "seed=1"], "minimize", r"model.beta: .* other values, interval\(1.0,2.0\); give another hydra"),
        (["model=vae,mhvae", "seed=1"], "maximize", "hydra.sweeper.direction=maximize: the study .* was begun to minimize"),
        (["model=vae,mhvae", "seed=2"], "minimize", "seed=2: the study .* was begun with seed=1 instead; give another"),
        (["model=vae,mhvae"], "minimize", "this search: the study .* was begun with seed=1 instead"),
        (["model=vae,mhvae", "seed=1", "data=mnist"], "minimize", "data=mnist: the study .* with the default instead"),
    ],
)
def test_another_search_in_the_same_directory_is_refused_before_it_touches_the_study(overrides, direction, words, tmp_path):
    optuna = pytest.importorskip("optuna")
    storage, before = f"sqlite:///{tmp_path}/study.db", tmp_path / "multirun.yaml"
    sweeper = OmegaConf.create({"storage": storage, "study_name": "sweep", "params": None, "direction": direction})
    assert other_study(sweeper, overrides, before) is None  # no study yet
    OmegaConf.save({"hydra": {"overrides": {"task": ["model=vae,mhvae", "seed=1", "logger=wandb"]}}}, before)
    distributions = optuna.distributions
    space = {
        "model": distributions.CategoricalDistribution(["vae", "mhvae"]),
        "model.beta": distributions.UniformDistribution(1.0, 2.0),
    }
    optuna.create_study(study_name="sweep", storage=storage).ask(space)
    found = other_study(sweeper, overrides, before)
    assert found is None if words is None else re.match(words, found)


@pytest.mark.parametrize("left", ["", "hydra:\n  overrides:\n    task:\n    - model=vae,mhvae\n    - 'see", "hydra:\n  over"])
def test_a_search_whose_record_was_cut_off_as_it_was_written_goes_on(left, tmp_path):
    optuna = pytest.importorskip("optuna")
    storage, before = f"sqlite:///{tmp_path}/study.db", tmp_path / "multirun.yaml"
    optuna.create_study(study_name="sweep", storage=storage).ask({})
    sweeper = OmegaConf.create({"storage": storage, "study_name": "sweep", "params": None, "direction": "minimize"})
    before.write_text(left)
    assert other_study(sweeper, ["model=vae,mhvae", "seed=1"], before) is None


def test_the_record_of_a_search_is_whole_or_the_one_before(tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    record = tmp_path / "multirun.yaml"
    record.write_text("hydra:\n  overrides:\n    task: []\n")
    before = record.read_text()

    def cut_off(config, path):
        path.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(OmegaConf, "save", cut_off)
    monkeypatch.setattr(SweepReport, "latest", None)
    monkeypatch.setattr("runs.sweep.other_study", lambda *_: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    search = {"_target_": "...SearchSweeper", "storage": None}
    config = {"hydra": {"sweep": {"dir": str(tmp_path)}, "sweeper": search, "launcher": {}, "overrides": {"task": []}}}
    report = SweepReport()
    report.directory = tmp_path
    with pytest.raises(KeyboardInterrupt):
        report._begin(OmegaConf.create({**config, "sweep": {"fresh": False}}))
    report._held.close()
    assert record.read_text() == before


@pytest.mark.parametrize("searches", [False, True])
def test_a_search_begun_anew_keeps_aside_what_was_there_once_and_not_what_it_has_done_itself(searches, tmp_path):
    report = SweepReport()
    report.directory, report.planned = tmp_path, []
    for name in ("refused-1", "failed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.json").write_text("{}")
    (tmp_path / "study.db").touch()
    report._begin_anew()
    assert report.states() == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["failed-before-1", "study.db-before-1"]
    runs = []
    for _ in range(2):  # a search may ask for one trial twice, a grid is begun twice

        def run(cfg):
            runs.append(cfg)
            write_json(tmp_path / "run" / job_name(cfg, ()) / "result.json", {"objective": 1.0})
            return 1.0

        assert (
            run_in_sweep(configure(tmp_path, "model=vae", "sweep.fresh=true", *["hydra/sweeper=search"] * searches), run) == 1.0
        )
    assert len(runs) == (1 if searches else 2)


def test_a_trial_that_cannot_be_composed_has_failed_and_the_search_goes_on(tmp_path):
    optuna = pytest.importorskip("optuna")
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    study = optuna.create_study(study_name="sweep", storage=f"sqlite:///{sweep}/study.db")
    for model in ("ddpm", "vae"):
        study.enqueue_trial({"model": model, "model.beta": 0.5})
    settings = [*QUICK, "trainer.max_epochs=1", "callbacks.pictures=null", "logger=csv", f"hydra.sweep.dir={sweep}"]
    search = ["-m", "hydra/sweeper=search", "hydra.sweeper.n_trials=2", "model=vae,ddpm", "model.beta=0.5,2"]
    done = command(*search, *settings, cwd=tmp_path)
    assert "sweep: 1 of 2 jobs done, 1 failed" in done.stdout, done.stdout + done.stderr
    assert "failed: refused-" in done.stdout
    assert "model.beta is a setting of" in done.stdout
    assert done.returncode == 1
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]
    assert [path.parent.name.split("-")[0] for path in sweep.glob("*/result.json")] == ["vae"]


def test_a_search_that_another_process_is_at_is_refused(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ("-m", "hydra/sweeper=search", "model=vae", "model.beta=0.5,2", f"hydra.sweep.dir={tmp_path}")
    with hold(tmp_path):
        done = command(*search, cwd=tmp_path)
    assert done.stderr == f"error: hydra.sweep.dir={tmp_path}: another process is at this search; wait for its end\n"
    assert (done.returncode, (tmp_path / "study.db").exists()) == (1, False)


def test_a_search_without_a_success_ends_with_its_summary(tmp_path, monkeypatch, capsys):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.json").write_text(json.dumps({"status": "failed", "reason": "why"}))
    report = SweepReport()
    report.directory, report.planned = tmp_path, []
    monkeypatch.setattr(SweepReport, "latest", report)

    def main():
        raise ValueError("Record does not exist.")  # as the plugin does when it looks for the best of none

    assert run_sweep(main) == 1
    assert capsys.readouterr().out.startswith(f"sweep: 0 of 1 jobs done, 1 failed in {tmp_path}\n  failed: job  why")
    (tmp_path / "job" / "result.json").write_text(json.dumps({"objective": 1.0}))
    with pytest.raises(ValueError, match="Record"):
        run_sweep(main)


def test_optuna_minimises_the_validation_figure_with_two_ranks_and_goes_on(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    overrides = ["-m", "hydra/sweeper=search", *RANKS, "trainer.devices=2", "model.optimizer.lr=interval(1e-4,1e-2)"]
    for trials, said in ((1, "0 of 1 trials spent (0 failed), 0 interrupted, 1 to run"), (2, "1 of 2 trials spent")):
        done = command(*overrides, f"hydra.sweeper.n_trials={trials}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
        (sweep,) = sweeps(tmp_path)
        objectives = [result(path.parent)["objective"] for path in sweep.glob("*/result.json")]
        assert len(objectives) == trials
    runs = [next(r.run for r in records(path) if r.WhichOneof("record_type") == "run") for path in wandb_files(tmp_path)]
    jobs = {path.parent.name: json.loads(path.read_text())["overrides"] for path in sweep.glob("*/job.json")}
    assert {run.display_name for run in runs} == set(jobs)
    for run in runs:
        (rate,) = (item for item in jobs[run.display_name] if "optimizer.lr" in item)
        assert list(run.tags) == [rate]  # what varies, and no more
        directory = sweep / run.display_name
        assert_ranks_agree(directory)
        run_here(tmp_path / run.run_id, *JOB, rate, "logger=csv")  # by one rank
        assert result(tmp_path / run.run_id / "run")["objective"] == pytest.approx(result(directory)["objective"], abs=1e-4)
    best = [line for line in done.stdout.splitlines() if "Best value" in line]
    assert float(best[0].split()[-1]) == pytest.approx(min(objectives))


def test_a_killed_search_goes_on_with_the_trial_that_was_cut_off_and_adds_none(tmp_path):
    optuna = pytest.importorskip("optuna")
    overrides = ["-m", "hydra/sweeper=search", "hydra.sweeper.n_trials=2", *LONG, "model.optimizer.lr=interval(1e-4,1e-2)"]
    killed = start(overrides, tmp_path)
    killed.kill()
    assert killed.finish(timeout=60).returncode == -signal.SIGKILL
    (directory,) = (path.parents[1] for path in checkpoints(tmp_path))
    (rate,) = (item for item in json.loads((directory / "job.json").read_text())["overrides"] if "optimizer.lr" in item)
    done = command(*overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "search: 0 of 2 trials spent (0 failed), 1 interrupted, 2 to run" in done.stdout
    assert f"interrupted, goes on: trial 0  {rate}" in done.stdout
    assert f"continuing from {directory}/checkpoints/last.ckpt" in done.stdout
    assert "sweep: 2 of 2 jobs done" in done.stdout
    study = optuna.load_study("sweep", f"sqlite:///{directory.parent}/study.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    assert result(directory)["objective"] == study.trials[0].value
    assert f"model.optimizer.lr={study.trials[0].params['model.optimizer.lr']}" == rate
    again = command(*overrides, cwd=tmp_path)  # nothing is left to do
    assert again.returncode == 0, again.stderr
    assert "search: 2 of 2 trials spent (0 failed), 0 interrupted, 0 to run" in again.stdout
    assert len(list(directory.parent.glob("*/result.json"))) == 2
