"""Exponential moving average of the weights, used for validation, test and samples."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class EMA(WeightAveraging):
    """Lightning's WeightAveraging with a decay that warms up, and with its faults mended.

    The decay is min(``decay``, (1 + n)/(10 + n)) at update n (as in Ho et al. 2020's and TensorFlow's code), so that short
    runs are averaged over what they have. Checkpoints hold the average in ``state_dict`` and the raw weights beside it.

    What Lightning 2.6 gets wrong and is mended here: it averages constant buffers; it tests the raw weights when ``test``
    follows ``fit`` in one process; and it saves the two sets of weights swapped when validation raises.

    Args:
        decay: in [0, 1).

    Raises:
        ValueError: if ``decay`` lies outside.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.ema.decay={decay} must lie in [0, 1); ~callbacks.ema trains without averaging")
        self._swapped = False

        @torch.no_grad()
        def update(average: list[Tensor], current: list[Tensor], num_averaged: Tensor | int) -> None:
            n = int(num_averaged)
            torch._foreach_lerp_(average, current, 1 - min(decay, (1 + n) / (10 + n)))

        super().__init__(use_buffers=False, multi_avg_fn=update)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the average when fit begins; later stages keep the average that the checkpoint's ``state_dict`` holds."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)
        elif not trainer.sanity_checking:
            self._average_model = None

    def _swap_models(self, pl_module: LightningModule) -> None:
        """Exchanges parameters only: buffers belong to the run, not to one of the two sets of weights."""
        self._swapped = not self._swapped
        for average, current in zip(self._average_model.module.parameters(), pl_module.parameters(), strict=True):
            average.data, current.data = current.data, average.data

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Puts the raw weights back before a checkpoint of the interrupted run is written."""
        if self._swapped:
            self._swap_models(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writes the average as ``state_dict``, with the buffers of this moment."""
        if self._average_model is None:
            return
        if self._swapped:
            raise RuntimeError("a checkpoint was asked for while the averaged weights are in the model")
        for average, current in zip(self._average_model.module.buffers(), pl_module.buffers(), strict=True):
            average.copy_(current)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores both sets of weights when training resumes; testing takes the average as loaded."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
