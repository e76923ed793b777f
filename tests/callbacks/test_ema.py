"""The average, and the faults of Lightning's own callback that ours does not have, each held here."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from callbacks import EMA


class Counter(LightningModule):
    """One weight that grows by 1 a step, and a buffer that must stay."""

    def __init__(self, fail_in_validation=False):
        super().__init__()
        self.weight, self.fail = nn.Parameter(torch.zeros(())), fail_in_validation
        self.register_buffer("table", torch.linspace(1e-4, 0.02, 1000))
        self.seen = {}

    def training_step(self, batch, batch_idx):
        return -self.weight

    def validation_step(self, batch, batch_idx):
        self.seen["val"] = self.weight.item()
        if self.fail and self.trainer.global_step:
            raise RuntimeError("validation fails")

    def test_step(self, batch, batch_idx):
        self.seen["test"] = self.weight.item()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Saver(Callback):
    def __init__(self, path):
        self.path = path

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.path)


class AtTheEnd(Callback):
    """Notes the weight when validation ends, as pictures are drawn then, and saves during validation."""

    def __init__(self, path):
        self.path, self.seen = path, None

    def on_validation_batch_end(self, trainer, pl_module, *arguments):
        trainer.save_checkpoint(self.path)

    def on_validation_end(self, trainer, pl_module):
        self.seen = pl_module.weight.item()


def loader(num):
    return DataLoader(torch.zeros(num, 1))


def expected(decay, steps):
    """The recursion in plain Python: the first update copies."""
    average = 1.0
    for n in range(1, steps):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * (n + 1)
    return average


def trainer(tmp_path, *callbacks, **settings):
    return Trainer(
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_decay_warms_up_and_validation_and_test_use_the_average(decay, tmp_path):
    model, checkpoint = Counter(), ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(tmp_path, EMA(decay), checkpoint, max_epochs=1, num_sanity_val_steps=0)
    run.fit(model, loader(9), loader(1))
    run.test(model, loader(1), ckpt_path=checkpoint.best_model_path, verbose=False)
    assert model.seen["val"] == pytest.approx(expected(decay, 9))
    assert model.seen["test"] == pytest.approx(expected(decay, 9))
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    assert saved["state_dict"]["weight"].item() == pytest.approx(expected(decay, 9))
    assert saved["current_model_state"]["weight"].item() == 9


def test_constant_buffers_stay_to_the_last_bit(tmp_path):
    model, before = Counter(), Counter().table.clone()
    run = trainer(tmp_path, EMA(0.9), max_epochs=1, enable_checkpointing=False)
    run.fit(model, loader(200))
    assert torch.equal(model.table, before)


def test_an_exception_in_validation_does_not_swap_the_two_sets(tmp_path):
    model = Counter(fail_in_validation=True)
    run = trainer(
        tmp_path, EMA(0.5), Saver(tmp_path / "x.ckpt"), max_epochs=1, num_sanity_val_steps=0, enable_checkpointing=False
    )
    with pytest.raises(RuntimeError, match="validation fails"):
        run.fit(model, loader(5), loader(1))
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert saved["state_dict"]["weight"].item() == pytest.approx(expected(0.5, 5))
    assert saved["current_model_state"]["weight"].item() == 5


def test_resuming_continues_both_sets_exactly(tmp_path):
    whole = Counter()
    trainer(tmp_path, EMA(0.9), max_epochs=2, enable_checkpointing=False).fit(whole, loader(6))
    half, checkpoint = Counter(), ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, EMA(0.9), checkpoint, max_epochs=1).fit(half, loader(6))
    resumed = Counter()
    run = trainer(tmp_path, EMA(0.9), max_epochs=2, enable_checkpointing=False)
    run.fit(resumed, loader(6), ckpt_path=checkpoint.last_model_path, weights_only=True)
    assert run.global_step == 12
    assert resumed.weight.item() == whole.weight.item() == pytest.approx(expected(0.9, 12))


def test_the_average_is_there_until_validation_has_ended_and_may_be_saved_from_within(tmp_path):
    model, end = Counter(), AtTheEnd(tmp_path / "x.ckpt")
    run = trainer(tmp_path, end, EMA(0.9), max_epochs=1, num_sanity_val_steps=0, enable_checkpointing=False)
    run.fit(model, loader(5), loader(1))
    assert end.seen == model.seen["val"] == pytest.approx(expected(0.9, 5))
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert saved["state_dict"]["weight"].item() == pytest.approx(expected(0.9, 5))
    assert saved["current_model_state"]["weight"].item() == 5
    assert model.weight.item() == pytest.approx(expected(0.9, 5))  # what fit leaves in the model


@pytest.mark.parametrize("decay", [1.0, -0.1, 2])
def test_other_decays_are_refused(decay):
    with pytest.raises(ValueError, match=r"callbacks\.ema\.decay"):
        EMA(decay)
