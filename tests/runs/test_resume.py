"""A run that stops in the middle of an epoch goes on with the next batch, and ends as if it had not stopped."""

import itertools

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


@pytest.mark.parametrize(
    ("hook", "batch", "error", "goes_on_at"),
    [
        ("training_step", 4, KeyboardInterrupt, 4),  # digits have 11 batches an epoch
        ("training_step", 16, KeyboardInterrupt, 16),
        ("on_train_batch_end", 20, KeyboardInterrupt, 21),
        ("training_step", 11, KeyboardInterrupt, 11),
        ("training_step", 18, RuntimeError, 15),  # as if killed: what validation saved is all there is
    ],
)
def test_mid_epoch_is_exact(hook, batch, error, goes_on_at, uninterrupted, tmp_path, monkeypatch):
    usual, count = getattr(VAELightningModule, hook), itertools.count()

    def stops(self, *args):
        if next(count) == batch:
            raise error
        return usual(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(VAELightningModule, hook, stops)
        with pytest.raises((SystemExit, error)):
            run_here(tmp_path, *COMMON)
    assert last(tmp_path)["global_step"] == goes_on_at
    run_here(tmp_path, *COMMON, "ckpt=last")
    there = last(tmp_path)
    assert uninterrupted["global_step"] == there["global_step"] == 30  # the last validation
    for key in ("state_dict", "optimizer_states"):
        assert same(uninterrupted[key], there[key])
