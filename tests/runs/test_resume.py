"""A run that stops in the middle of an epoch goes on with the next batch, and ends as if it had not stopped."""

import itertools
import os
import signal

import pytest
import torch

from lightning_modules import VAELightningModule
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
    return last(directory)


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
        (ctrl_c, 16, 17),
        (ctrl_c, 21, 22),
        (interrupted_at_once, 16, 16),
        (interrupted_at_once, 11, 11),
        (killed, 18, 15),  # what the last validation saved is all there is
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
    there = last(tmp_path)
    assert uninterrupted["global_step"] == there["global_step"] == 30  # the last validation
    for key in ("state_dict", "optimizer_states"):
        assert same(uninterrupted[key], there[key])
