"""A validation at the end of training, wherever that is."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class LastValidation(Callback):
    """Has training end in a validation: also at max_steps, at max_time, and behind an epoch that none is due for.

    Else the steps behind the last one would be in no checkpoint, and a short training would have no figure and no best weights.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds it to those that Lightning finds due."""
        loop = trainer.fit_loop.epoch_loop
        is_due = type(loop)._should_check_val_fx
        loop._should_check_val_fx = lambda fetcher: is_due(loop, fetcher) or (trainer.enable_validation and _ends(trainer))


def _ends(trainer: Trainer) -> bool:
    """Whether training ends behind this batch."""
    fit_loop = trainer.fit_loop
    loop = fit_loop.epoch_loop
    if fit_loop.max_steps != -1 and loop.global_step >= fit_loop.max_steps:
        return True
    if trainer.should_stop and fit_loop._can_stop_early:
        return True
    last_epoch = fit_loop.max_epochs not in (None, -1) and fit_loop.epoch_progress.current.processed + 1 >= fit_loop.max_epochs
    return last_epoch and loop._num_ready_batches_reached()
