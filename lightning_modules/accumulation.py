"""Optimiser steps of several batches: the last of an epoch, which may have fewer, and those that a validation comes within."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_modules.sharding import sharded_parts


def share_of_step(trainer: Trainer, batch_idx: int) -> float:
    """Returns which part of ``accumulate_grad_batches`` the batches of this optimiser step are: below 1 at an epoch's end.

    Lightning divides every loss by the whole number, so the gradient of a step of fewer batches would be too small, as if
    the others had none.
    """
    together, num = trainer.accumulate_grad_batches, trainer.num_training_batches
    if together == 1 or math.isinf(num):  # of batches that nobody has counted it is not known
        return 1.0
    return min(together, num - batch_idx // together * together) / together


def _is_within_step(module: LightningModule) -> bool:
    """Whether gradients are being accumulated, and lie whole on this rank."""
    trainer = module.trainer
    fitting = trainer.state.fn == TrainerFn.FITTING and trainer.accumulate_grad_batches > 1
    return fitting and trainer.fit_loop.epoch_loop._should_accumulate() and not sharded_parts(module)


def share(module: LightningModule) -> None:
    """Gives all ranks the mean of their gradients, within an optimiser step: the step's mean stays what it is."""
    if module.trainer.world_size > 1 and _is_within_step(module):
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad.copy_(module.trainer.strategy.reduce(parameter.grad.clone(), reduce_op="mean"))


def recorded(module: LightningModule) -> dict[str, Any]:
    """Returns what :func:`go_on` takes: the gradients of a step that has begun; nothing between steps."""
    if not _is_within_step(module):
        return {}
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return {"together": module.trainer.accumulate_grad_batches, "gradients": gradients}


def go_on(module: LightningModule, begun: dict[str, Any]) -> None:
    """Puts the gradients of a step that has begun in their place, if steps have as many batches as then."""
    if begun.get("together") == module.trainer.accumulate_grad_batches:
        for name, parameter in module.named_parameters():
            if name in begun["gradients"]:
                parameter.grad = begun["gradients"][name].to(parameter.device)
