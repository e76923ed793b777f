"""Exponential moving average of the weights, used for validation, test and samples."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_modules.sharding import load_whole, local, sharded_parts


class EMA(Callback):
    """Averages the parameters after every optimiser step, and validates, tests and saves with the average.

    The decay is min(``decay``, (1 + n)/(10 + n)) at update n (TensorFlow's rule for ``num_updates``), so that short runs are
    averaged over what they have; update 0 copies, as in Ho et al. 2020's code, whose decay is constant after it. Checkpoints
    of a ``fit`` hold the average in ``state_dict`` and the raw weights beside it, as Lightning's own callback writes them.
    After it the model holds the average alone, and so does what ``trainer.save_checkpoint`` then writes.

    Lightning's callback is not used: it averages constant buffers, tests the raw weights when ``test`` follows ``fit`` in one
    process, saves the two sets swapped when validation raises, cannot average sharded weights, and waits for the device at
    every step. Here the average is a list of tensors, this rank's shards if the model is sharded.

    Args:
        decay: in [0, 1).

    Raises:
        ValueError: if ``decay`` lies outside.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.ema.decay={decay} must lie in [0, 1); ~callbacks.ema trains without averaging")
        self.decay = decay
        self._forget()

    def _forget(self) -> None:
        self._average: list[Tensor] = []  # the weights that are not in the model: the average, but for _swapped
        self._current: list[Tensor] = []  # those that are in it
        self._swapped = False
        self._updates = self._latest_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begins anew; after ``fit`` the model holds the average, and so does the ``state_dict`` that test loads."""
        self._forget()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores both sets of weights when training resumes; the model has just been given ``state_dict``."""
        if trainer.state.fn != "fit":
            return
        self._average = [local(parameter).clone() for parameter in pl_module.parameters()]
        if "current_model_state" in checkpoint:
            self._updates = int(checkpoint["averaging_state"]["n_averaged"])
            load_whole(pl_module, checkpoint["current_model_state"])

    def state_dict(self) -> dict[str, Any]:
        """Returns after which step the average was last updated."""
        return {"latest_update_step": self._latest_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it from a checkpoint."""
        self._latest_step = state_dict["latest_update_step"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the average, where the weights now are: on their device, sharded if they are."""
        self._current = [local(parameter) for parameter in pl_module.parameters()]
        if self._average:
            self._average = [average.to(now.device) for average, now in zip(self._average, self._current, strict=True)]
        else:
            self._average = [now.clone() for now in self._current]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Averages, if the batch ended in an optimiser step."""
        if trainer.global_step <= self._latest_step:
            return
        self._latest_step = trainer.global_step
        n = self._updates
        weight = 1 - min(self.decay, (1 + n) / (10 + n)) if n else 1.0
        torch._foreach_lerp_(self._average, self._current, weight)
        self._updates += 1

    def _swap(self) -> None:
        # by value: compiled and sharded networks keep hold of the memory that they read
        for other, now in zip(self._average, self._current, strict=True):
            kept = other.clone()
            other.copy_(now)
            now.copy_(kept)
        self._swapped = not self._swapped

    @torch.no_grad()
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validates with the average."""
        if self._average:
            self._swap()

    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Goes on with the raw weights. Callbacks named before this one still see the average when validation ends."""
        if self._average:
            self._swap()

    @torch.no_grad()
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Puts the raw weights back before a checkpoint of the interrupted run is written."""
        if self._swapped:
            self._swap()

    @torch.no_grad()
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the average in the model."""
        for average, parameter in zip(self._average, pl_module.parameters(), strict=True):
            local(parameter).copy_(average)
        self._forget()

    @torch.no_grad()
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writes the average as ``state_dict`` and the raw weights beside it, also during a validation."""
        if not self._average:
            return
        now, other = checkpoint["state_dict"], self._other_state(trainer, pl_module)
        checkpoint["state_dict"], checkpoint["current_model_state"] = (now, other) if self._swapped else (other, now)
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._updates)}

    def _other_state(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """The state dict with the weights that are not in the model, and the buffers of this moment."""
        if sharded_parts(pl_module):
            self._swap()
            state = trainer.strategy.lightning_module_state_dict()
            self._swap()
            return state
        others = {id(parameter): other for parameter, other in zip(pl_module.parameters(), self._average, strict=True)}
        return {name: others.get(id(value), value) for name, value in pl_module.state_dict(keep_vars=True).items()}
