"""Training ends in a validation wherever it ends, and what is tested, kept and reported is of the steps that are named."""

import csv

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks import RunCheckpoint
from tests.jobs import result, run_here

# 11 steps an epoch
JOB = ("model=vae", "logger=csv", "callbacks.pictures=null", "trainer.check_val_every_n_epoch=5")


class StopsAt(Callback):
    """Stops as trainer.max_time does."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


class KilledAt(StopsAt):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def kept(directory, name):
    return torch.load(directory / f"run/checkpoints/{name}.ckpt", weights_only=True)


def validations(directory):
    with (directory / "run/metrics.csv").open(newline="") as file:
        return [int(row["step"]) + 1 for row in csv.DictReader(file) if row.get("val/elbo")]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (("trainer.max_epochs=2",), [22]),
        (("trainer.max_epochs=5",), [55]),  # which is validated anyway, and once
        (("trainer.max_epochs=6",), [55, 66]),
        (("trainer.max_epochs=9", "trainer.max_steps=60"), [55, 60]),
        (("trainer.max_steps=5", "trainer.accumulate_grad_batches=2"), [5]),
        (("+callbacks.stop._target_=tests.callbacks.test_last_validation.StopsAt", "+callbacks.stop.step=15"), [15]),
        (("trainer.max_epochs=1", "trainer.check_val_every_n_epoch=null", "+trainer.val_check_interval=4"), [4, 8, 11]),
    ],
)
def test_the_last_steps_are_validated_and_kept(settings, steps, tmp_path):
    run_here(tmp_path, *JOB, *settings)
    assert validations(tmp_path) == steps
    assert kept(tmp_path, "last")["global_step"] == result(tmp_path / "run")["step"] == steps[-1]
    assert result(tmp_path / "run")["objective"] is not None


def test_without_validations_every_epoch_is_kept_and_a_killed_run_goes_on(tmp_path):
    settings = (*JOB, "trainer.max_epochs=3", "+trainer.limit_val_batches=0")
    killed = "tests.callbacks.test_last_validation.KilledAt"
    with pytest.raises(RuntimeError, match="killed"):
        run_here(tmp_path / "parts", *settings, f"+callbacks.stop._target_={killed}", "+callbacks.stop.step=25")
    assert kept(tmp_path / "parts", "last")["global_step"] == 22
    run_here(tmp_path / "parts", *settings, "ckpt=last")
    run_here(tmp_path / "whole", *settings)
    assert validations(tmp_path / "whole") == []
    assert kept(tmp_path / "parts", "last")["global_step"] == 33
    assert result(tmp_path / "parts/run")["metrics"] == result(tmp_path / "whole/run")["metrics"]


@pytest.mark.parametrize("settings", [("trainer.max_steps=15",), ("trainer.max_epochs=2",)])
def test_a_run_that_goes_on_behind_it_ends_as_one_that_was_longer_at_once(settings, tmp_path):
    longer = (*JOB, "trainer.max_epochs=3")
    run_here(tmp_path / "parts", *longer, *settings)
    run_here(tmp_path / "parts", *longer, "ckpt=last")
    run_here(tmp_path / "whole", *longer)
    parts, whole = kept(tmp_path / "parts", "last"), kept(tmp_path / "whole", "last")
    assert parts["global_step"] == whole["global_step"] == 33
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, whole[key][name]) for name, value in parts[key].items())
    assert parts["loops"]["fit_loop"]["epoch_progress"] == whole["loops"]["fit_loop"]["epoch_progress"]


def test_last_is_written_where_the_figure_is_not_the_best_and_the_step_of_the_tested_weights_is_told(
    tmp_path, monkeypatch, capsys
):
    usual = RunCheckpoint._monitor_candidates
    worse = lambda self, trainer: usual(self, trainer) | {"val/elbo": torch.tensor(-float(trainer.global_step))}  # noqa: E731
    monkeypatch.setattr(RunCheckpoint, "_monitor_candidates", worse)
    run_here(tmp_path, *JOB, "trainer.max_epochs=3", "trainer.check_val_every_n_epoch=1")
    assert kept(tmp_path, "best")["global_step"] == 11
    assert kept(tmp_path, "last")["global_step"] == 33
    record = result(tmp_path / "run")
    assert (record["step"], record["tested_step"]) == (33, 11)
    assert "step 11, the best of 33" in capsys.readouterr().out


def test_a_checkpoint_callback_of_ones_own_keeps_what_it_likes_and_tests_nothing(tmp_path):
    kind = "lightning.pytorch.callbacks.ModelCheckpoint"
    keep = f"+callbacks.keep={{_target_: {kind}, every_n_train_steps: 6, save_top_k: -1, dirpath: '{tmp_path / 'kept'}'}}"
    run_here(tmp_path, *JOB, "trainer.max_epochs=1", keep)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["epoch=0-step=6.ckpt"]
    assert result(tmp_path / "run")["checkpoint"] == "best.ckpt"
    assert result(tmp_path / "run")["tested_step"] == 11
