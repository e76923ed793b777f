"""Noise that depends on the seed and the batch alone: not on the number of devices, nor on what ran before."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from losses.draws import mix, set_rows


class SeededBatches(Callback):
    """Seeds the generators before every batch, and says which rows of the global batch this rank holds.

    A training batch is known by how many came before, so a resumed run draws what an uninterrupted one would; evaluation
    batches by their place, so every validation of a run uses the same noise.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seeds a training batch."""
        self._begin(trainer, "train", trainer.fit_loop.total_batch_idx, trainer.train_dataloader, batch_idx)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seeds a validation batch."""
        self._begin(trainer, "val", batch_idx, trainer.val_dataloaders, batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seeds a test batch."""
        self._begin(trainer, "test", batch_idx, trainer.test_dataloaders, batch_idx)

    def _begin(self, trainer: Trainer, stage: str, counter: int, loader: Any, batch_idx: int) -> None:
        torch.manual_seed(mix(self.seed, stage, counter))
        sampler = getattr(loader, "sampler", None)
        set_rows(sampler.rows(batch_idx) if hasattr(sampler, "rows") else None)

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
