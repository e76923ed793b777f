"""How training fares beside the bound: learning rate, gradient norm, throughput, memory, images seen."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer


class Vitals(Callback):
    """Logs train/{lr, grad_norm, images_per_second, images_seen} every ``log_every_n_steps``, and memory on a GPU.

    The gradient's norm is taken before clipping. Throughput counts training alone: the clock stops for validation.
    """

    def __init__(self) -> None:
        self._since, self._images = time.monotonic(), 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._restart()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock again: validation is not training."""
        self._restart()

    def _restart(self) -> None:
        self._since, self._images = time.monotonic(), 0

    @staticmethod
    def _due(trainer: Trainer) -> bool:
        return (trainer.global_step + 1) % trainer.log_every_n_steps == 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Logs the learning rate and the gradient's norm."""
        if self._due(trainer):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            pl_module.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))
            pl_module.log("train/lr", optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Counts the images of all devices, and logs how many a second since the last time."""
        self._images += len(batch) * trainer.world_size
        if trainer.global_step % trainer.log_every_n_steps or not self._images:
            return
        elapsed = max(time.monotonic() - self._since, 1e-9)
        batch_size = len(batch) * trainer.world_size * trainer.accumulate_grad_batches
        logged = {"images_per_second": self._images / elapsed, "images_seen": float(trainer.global_step * batch_size)}
        if pl_module.device.type == "cuda":
            logged["memory_gb"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
        pl_module.log_dict({f"train/{name}": value for name, value in logged.items()})
        self._restart()
