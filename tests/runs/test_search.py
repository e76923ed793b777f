"""A search that is started again: its trials are a total, and what was cut off waits to go on."""

import json

import pytest
from omegaconf import OmegaConf

from runs.search import go_on
from runs.sweep import SweepReport, run_sweep


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
