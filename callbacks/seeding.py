"""Noise that depends on the seed and the batch alone: not on the number of devices, nor on what ran before."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from losses.draws import mix, set_rows


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds the generator of the CPU and the one of ``device``.

    ``torch.manual_seed`` seeds those of every backend: where one of them is missing it keeps a stack trace each time, which
    took a tenth of a small model's step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)


class SeededBatches(Callback):
    """Seeds the generators before every batch, and says which rows of the global batch this rank holds.

    A training batch is known by how many came before, so a resumed run draws what an uninterrupted one would; evaluation
    batches by their place, so every validation of a run uses the same noise. With a loader that cuts no global batch, each rank
    draws its own.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seeds a training batch."""
        # not fit_loop.total_batch_idx, which counts a batch twice that was interrupted and is done again
        epoch, length = trainer.current_epoch, trainer.num_training_batches
        key = (epoch, batch_idx) if math.isinf(length) else (epoch * length + batch_idx,)
        self._begin(trainer, "train", key, trainer.train_dataloader, batch_idx)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seeds a validation batch."""
        self._begin(trainer, "val", (batch_idx,), trainer.val_dataloaders, batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seeds a test batch."""
        self._begin(trainer, "test", (batch_idx,), trainer.test_dataloaders, batch_idx)

    def _begin(self, trainer: Trainer, stage: str, key: tuple[int, ...], loader: Any, batch_idx: int) -> None:
        sampler = getattr(loader, "sampler", None)
        rows = sampler.rows(batch_idx) if hasattr(sampler, "rows") else None
        if rows is None and trainer.global_rank:  # a loader of one's own: nothing is drawn for all ranks and cut
            key = (*key, trainer.global_rank)
        seed_generators(mix(self.seed, stage, *key), trainer.strategy.root_device)
        set_rows(rows)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Tensor | None, batch: Any, batch_idx: int
    ) -> None:
        """Draws outside of a batch are nobody's rows."""
        set_rows(None)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws outside of a batch are nobody's rows."""
        set_rows(None)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws outside of a batch are nobody's rows."""
        set_rows(None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draws outside of a batch are nobody's rows."""
        set_rows(None)
