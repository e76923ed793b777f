"""How training fares beside the bound: learning rate, gradient norm, throughput, memory, images seen."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.base import is_logged, total_norm


class Vitals(Callback):
    """Logs train/{lr, grad_norm, images_per_second} every ``log_every_n_steps``, GPU memory, and images_seen in every row.

    The gradient's norm is taken before clipping. Throughput counts training alone: the clock stops for validation.

    Attributes:
        images_seen: by the optimiser, over all devices and sessions of the run; checkpoints hold it.
        session_seconds: of training and validation in this process, once it is over.
    """

    def __init__(self) -> None:
        self._since, self._images = time.monotonic(), 0
        self.images_seen, self.session_seconds, self._earlier, self._began, self._step = 0, 0.0, 0.0, None, 0

    # -- what the run has cost so far: images and seconds, over all of its sessions

    @property
    def seconds(self) -> float:
        """Seconds of training and validation, over all sessions."""
        running = 0.0 if self._began is None else time.monotonic() - self._began
        return self._earlier + self.session_seconds + running

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the totals with the weights."""
        checkpoint["totals"] = {"images_seen": self.images_seen, "seconds": self.seconds}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Goes on counting where training goes on; testing the best weights takes nothing back."""
        if trainer.state.fn == TrainerFn.FITTING and "totals" in checkpoint:
            self.images_seen, self._earlier = checkpoint["totals"]["images_seen"], checkpoint["totals"]["seconds"]
            self.session_seconds = 0.0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock of the totals."""
        self.session_seconds, self._began = time.monotonic() - self._began, None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds images_seen to the row of val/*."""
        self._log_images_seen(pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds images_seen to the row of test/*."""
        self._log_images_seen(pl_module)

    def _log_images_seen(self, pl_module: LightningModule) -> None:
        pl_module.log("images_seen", torch.tensor(self.images_seen, dtype=torch.float64))  # float32 cannot count past 2^24

    # -- how it fares now

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clocks: those of a run that begins, or of another session of one that goes on."""
        if trainer.global_step:
            self._earlier += self.session_seconds
        else:
            self.images_seen, self._earlier = 0, 0.0
        self.session_seconds = 0.0
        self._began, self._step = time.monotonic(), trainer.global_step
        self._restart()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock again: validation is not training."""
        self._restart()

    def _restart(self) -> None:
        self._since, self._images = time.monotonic(), 0

    @staticmethod
    def _due(trainer: Trainer) -> bool:
        return is_logged(trainer, trainer.global_step + 1)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Logs the learning rate and the gradient's norm."""
        if self._due(trainer):
            norm = total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
                norm = norm / scaler.get_scale()  # which a fused optimiser takes out in its own step
            pl_module.train_row["train/grad_norm"] = norm
            pl_module.train_row["train/lr"] = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Counts the images of all devices, and logs how many a second since the last time."""
        images = len(batch) * trainer.world_size
        self.images_seen += images
        self._images += images
        step = trainer.global_step
        if step == self._step or not is_logged(trainer, step):  # gradients are being accumulated, or it is not yet time
            return
        self._step = step
        elapsed = max(time.monotonic() - self._since, 1e-9)
        row = {"train/images_per_second": self._images / elapsed, "images_seen": self.images_seen}
        if pl_module.device.type == "cuda":
            row["train/memory_gb"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
        pl_module.train_row |= row
        self._restart()
