"""A run that stops in the middle of an epoch goes on with the next batch, and ends as if it had not stopped."""

import csv
import itertools
import os
import signal

import pytest
import torch

from callbacks import Vitals
from lightning_modules import VAELightningModule
from runs.build import SettingError
from tests.jobs import run_here

COMMON = (
    "model=vae", "logger=csv", "callbacks.pictures.every_n_epochs=0", "trainer.max_epochs=3", "+trainer.val_check_interval=4",
)  # fmt: skip


def last(directory):
    return torch.load(directory / "run/checkpoints/last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    run_here(directory, *COMMON)
    return directory


def rows(directory):
    """Returns what was logged, but for how fast it went."""
    with (directory / "run/metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if "per_second" not in name} for row in csv.DictReader(file)]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def interrupted_at_once():
    raise KeyboardInterrupt


def killed():
    raise RuntimeError


@pytest.fixture(autouse=True)
def _heed_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)  # Lightning ignores it after the first


@pytest.mark.parametrize(
    ("stop", "batch", "goes_on_at"),
    [
        (ctrl_c, 3, 4),  # digits have 11 batches an epoch, and here a validation after 4 and 8 of them
        (ctrl_c, 14, 15),  # behind a step that is logged
        (ctrl_c, 16, 17),
        (ctrl_c, 21, 22),
        (interrupted_at_once, 16, 16),
        (interrupted_at_once, 11, 11),
        (killed, 18, 15),  # what the last validation saved is all there is
        (killed, 29, 26),  # and not the row of step 28
    ],
)
def test_mid_epoch_is_exact(stop, batch, goes_on_at, uninterrupted, tmp_path, monkeypatch):
    usual, count = VAELightningModule.training_step, itertools.count()

    def stops(self, *args):
        if next(count) == batch:
            stop()
        return usual(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(VAELightningModule, "training_step", stops)
        with pytest.raises((SystemExit, KeyboardInterrupt, RuntimeError)):
            run_here(tmp_path, *COMMON)
    assert last(tmp_path)["global_step"] == goes_on_at
    run_here(tmp_path, *COMMON, "ckpt=last")
    here, there = last(uninterrupted), last(tmp_path)
    assert here["global_step"] == there["global_step"] == 30  # the last validation
    for key in ("state_dict", "optimizer_states"):
        assert same(here[key], there[key])
    kept = [row for row in rows(uninterrupted) if stop is not ctrl_c or not row["val/elbo"] or int(row["step"]) != batch]
    assert rows(tmp_path) == kept  # a validation that is due behind the step that was stopped behind is left out


def test_what_is_begun_anew_where_nothing_was_saved_has_its_own_rows_alone(uninterrupted, tmp_path, monkeypatch):
    def stops(self, trainer, *args):
        if trainer.global_step == 21:
            raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(Vitals, "on_train_batch_end", stops, raising=False)
        with pytest.raises(RuntimeError):
            run_here(tmp_path, *COMMON, "+trainer.enable_checkpointing=false")
    run_here(tmp_path, *COMMON, "ckpt=auto")
    assert rows(tmp_path) == rows(uninterrupted)


def test_another_batch_size_is_refused_amid_an_epoch_and_taken_at_its_end(tmp_path):
    run_here(tmp_path / "amid", *COMMON, "trainer.max_steps=15")
    with pytest.raises(SettingError, match=r"data\.batch_size=128, not 64"):
        run_here(tmp_path / "amid", *COMMON, "data.batch_size=64", "ckpt=last")
    run_here(tmp_path / "end", "model=vae", "logger=csv", "trainer.max_epochs=1")
    run_here(tmp_path / "end", "model=vae", "logger=csv", "data.batch_size=64", "ckpt=last")
    assert last(tmp_path / "end")["global_step"] == 11 + 22


def test_another_batch_size_is_refused_behind_the_first_batch_too(tmp_path, monkeypatch):
    usual, count = VAELightningModule.training_step, itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(VAELightningModule, "training_step", lambda *args: (next(count) == 11 and ctrl_c(), usual(*args))[1])
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            run_here(tmp_path, *COMMON)
    assert last(tmp_path)["global_step"] == 12
    with pytest.raises(SettingError, match="amid an epoch"):
        run_here(tmp_path, *COMMON, "data.batch_size=64", "ckpt=last")


def test_where_gradients_are_accumulated_each_step_has_one_row_and_validations_amid_one_stay(tmp_path, monkeypatch):
    accumulate = (
        *COMMON[:-1],
        "+trainer.val_check_interval=6",
        "trainer.accumulate_grad_batches=4",
        "trainer.log_every_n_steps=1",
    )
    run_here(tmp_path / "whole", *accumulate)
    steps = [(int(row["step"]), row["train/loss"] != "") for row in rows(tmp_path / "whole") if not row["test/elbo"]]
    assert steps[:6] == [(0, True), (1, False), (1, True), (2, True), (3, True), (4, False)]
    usual, count = VAELightningModule.training_step, itertools.count()

    def stops(self, *args):
        if next(count) == 8:
            raise RuntimeError
        return usual(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(VAELightningModule, "training_step", stops)
        with pytest.raises(RuntimeError):
            run_here(tmp_path / "parts", *accumulate)
    run_here(tmp_path / "parts", *accumulate, "ckpt=last")
    assert [row["step"] for row in rows(tmp_path / "parts")] == [row["step"] for row in rows(tmp_path / "whole")]


def test_a_finished_run_that_is_started_again_has_one_row_of_its_test(tmp_path):
    run_here(tmp_path, *COMMON, "trainer.max_epochs=1")
    before = rows(tmp_path)
    run_here(tmp_path, *COMMON, "trainer.max_epochs=1", "ckpt=auto")
    assert rows(tmp_path) == before
