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
        (("trainer.max_epochs=1", "trainer.check_val_every_n_epoch=null", "trainer.val_check_interval=4"), [4, 8, 11]),
    ],
)
def test_the_last_steps_are_validated_and_kept(settings, steps, tmp_path):
    run_here(tmp_path, *JOB, *settings)
    assert validations(tmp_path) == steps
    assert kept(tmp_path, "last")["global_step"] == result(tmp_path / "run")["step"] == steps[-1]
    assert result(tmp_path / "run")["objective"] is not None


def test_without_validations_every_epoch_is_kept_and_a_killed_run_goes_on(tmp_path):
    settings = (*JOB, "trainer.max_epochs=3", "trainer.limit_val_batches=0")
    killed = "tests.callbacks.test_last_validation.KilledAt"
    with pytest.raises(RuntimeError, match="killed"):
        run_here(tmp_path / "parts", *settings, f"+callbacks.stop._target_={killed}", "+callbacks.stop.step=25")
    assert kept(tmp_path / "parts", "last")["global_step"] == 22
    run_here(tmp_path / "parts", *settings, "ckpt=last")
    run_here(tmp_path / "whole", *settings)
    assert validations(tmp_path / "whole") == []
    assert kept(tmp_path / "parts", "last")["global_step"] == 33
    assert result(tmp_path / "parts/run")["metrics"] == result(tmp_path / "whole/run")["metrics"]


@pytest.mark.parametrize(
    ("shorter", "longer", "steps"),
    [
        (("trainer.max_steps=15",), (), 33),
        (("trainer.max_steps=15",), ("trainer.limit_val_batches=0",), 33),
        (("trainer.max_epochs=2",), (), 33),
        (("trainer.max_epochs=2",), ("trainer.max_steps=33",), 33),
        (("trainer.max_epochs=2",), ("trainer.check_val_every_n_epoch=1", "callbacks=early_stopping"), 33),
        (("trainer.max_epochs=2",), ("trainer.limit_train_batches=5",), 15),
    ],
)
def test_a_run_that_goes_on_after_it_ends_as_one_that_was_longer_at_once(shorter, longer, steps, tmp_path):
    common = (*longer, *JOB[:2], "callbacks.pictures=null", "trainer.max_epochs=3")
    if "trainer.check_val_every_n_epoch=1" not in longer:
        common += JOB[3:]
    run_here(tmp_path / "parts", *common, *shorter)
    run_here(tmp_path / "parts", *common, "ckpt=last")
    run_here(tmp_path / "whole", *common)
    parts, whole = kept(tmp_path / "parts", "last"), kept(tmp_path / "whole", "last")
    assert parts["global_step"] == whole["global_step"] == steps
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, whole[key][name]) for name, value in parts[key].items())


def test_a_finished_run_of_max_steps_that_is_started_again_keeps_one_row_of_its_test(tmp_path):
    def tested():
        with (tmp_path / "run/metrics.csv").open(newline="") as file:
            return [row["step"] for row in csv.DictReader(file) if row.get("test/elbo")]

    for again in ((), ("ckpt=auto",), ("ckpt=auto",)):
        run_here(tmp_path, *JOB, "trainer.max_steps=15", *again)
        assert tested() == ["15"]


@pytest.mark.parametrize(("least", "steps"), [("min_epochs=2", [22]), ("min_steps=14", [14])])
def test_a_stop_that_has_to_wait_ends_in_a_validation_too(least, steps, tmp_path):
    stop = ("+callbacks.stop._target_=tests.callbacks.test_last_validation.StopsAt", "+callbacks.stop.step=5")
    run_here(tmp_path, *JOB, *stop, f"+trainer.{least}", "trainer.max_epochs=4")
    assert validations(tmp_path) == steps


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
    assert "step 11 of 33, the best in validation" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["chosen", "default"])
def test_a_checkpoint_callback_of_ones_own_keeps_what_it_likes_and_tests_nothing(where, tmp_path):
    place = f", dirpath: '{tmp_path / 'kept'}'" if where == "chosen" else ""
    kind = "lightning.pytorch.callbacks.ModelCheckpoint"
    keep = f"+callbacks.keep={{_target_: {kind}, every_n_train_steps: 6, save_top_k: -1{place}}}"
    run_here(tmp_path, *JOB, "trainer.max_epochs=1", keep)
    assert len(list(tmp_path.rglob("epoch=0-step=6.ckpt"))) == 1
    assert (tmp_path / "run/metrics.csv").is_file()
    assert result(tmp_path / "run")["checkpoint"] == "best.ckpt"
    assert result(tmp_path / "run")["tested_step"] == 11
