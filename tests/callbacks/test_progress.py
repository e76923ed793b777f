import io

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from callbacks.progress import LiveProgress
from tests.jobs import run_here


class Counted(LiveProgress):
    """Notes how far the bar stands whenever it is moved."""

    def __init__(self, **settings):
        super().__init__(console_kwargs={"file": io.StringIO(), "force_terminal": True}, **settings)
        self.moves = []

    def _update(self, progress_bar_id, current, *more):
        if progress_bar_id == self.train_progress_bar_id and not self.trainer.validating:
            self.moves.append(current)
        super()._update(progress_bar_id, current, *more)


def moves(seconds):
    bar = Counted(seconds=seconds)
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[bar],
    )  # fmt: skip
    trainer.fit(BoringModel(), DataLoader(torch.randn(40, 32)))
    return [current for current in bar.moves if current]


def test_the_bar_is_moved_after_every_batch_if_it_may():
    assert moves(0.0) == [*range(1, 41)] * 2


def test_the_bar_is_moved_once_in_a_while_and_at_the_end_of_an_epoch():
    found = moves(3600.0)
    assert found.count(40) == 2
    assert len(found) <= 3  # and at the very first batch


def lines(tmp_path, capsys, *settings):
    run_here(tmp_path, "model=vae", "logger=csv", "callbacks.progress._target_=callbacks.LineProgress", *settings)
    return [" ".join(line.split()[:-2]) for line in capsys.readouterr().out.splitlines() if line.endswith(" s")]


def test_a_log_file_says_where_a_long_epoch_validation_or_test_is(tmp_path, capsys):
    found = lines(tmp_path, capsys, "+callbacks.progress.seconds=0", "+callbacks.progress.patience=0", "data.batch_size=90")
    assert found[0].startswith("epoch 1/2 step 1")
    assert "epoch 2/2 step 30 train/bpd" in " ".join(found)
    assert {"validation batch 1/2", "validation batch 2/2", "test batch 2/2"} <= set(found)
    assert any(line.startswith("epoch 2/2 step 30 val/bpd ") for line in found)
    assert len(found) == 2 * (15 + 2 + 1) + 2


def test_it_is_silent_where_a_validation_has_just_spoken(tmp_path, capsys):
    found = lines(tmp_path, capsys, "+callbacks.progress.seconds=0")
    assert [line.split(" val/bpd")[0] for line in found] == ["epoch 1/2 step 11", "epoch 2/2 step 22"]
