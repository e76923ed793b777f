"""Where training ends: in a validation, wherever that is, and where it had ended before."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.utilities.exceptions import SIGTERMException


class LastValidation(Callback):
    """Has training end in a validation: also at max_steps, at max_time, and after an epoch that none is due for.

    Else the steps after the last one would be in no checkpoint, and a short training would have no figure and no best weights.
    Not where a callback stops it at an epoch's end, when no batch is left for a validation to follow.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes the patience that is asked for, before a checkpoint brings the one that was."""
        self._patience = [(stop, stop.patience) for stop in trainer.callbacks if isinstance(stop, EarlyStopping)]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Has a run that goes on end where it had ended.

        One that was cut off in its last validation does that again, for which Lightning has no step left to train; one that
        early stopping had ended trains no more, of which Lightning keeps the count and not the verdict.
        """
        loop = trainer.fit_loop
        run = loop.run

        def run_or_validate() -> None:
            for stop, patience in self._patience:
                stop.patience = patience
                trainer.should_stop |= out_of_patience(stop)
            loop.setup_data()
            if not loop.skip or not is_cut_off(loop.epoch_loop.val_loop.batch_progress.state_dict()):
                return run()
            trainer.validating = True
            loop.epoch_loop.val_loop.run()
            trainer.training = True
            if trainer.received_sigterm:  # in its last batch, where Lightning looks no more
                raise SIGTERMException

        loop.run = run_or_validate

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds it to those that Lightning finds due."""
        loop = trainer.fit_loop.epoch_loop
        is_due = type(loop)._should_check_val_fx
        loop._should_check_val_fx = lambda fetcher: is_due(loop, fetcher) or (ends_here(trainer) and trainer.enable_validation)


def is_cut_off(batches: dict[str, Any]) -> bool:
    """Whether a validation, of whose batches this is the state, was cut off and has not been done again.

    Its totals stay one apart, as RunCheckpoint has marked them, also once it has been; then its last batch has been seen.
    """
    total = batches["total"]
    return total["started"] == total["ready"] == total["processed"] + 1 and not batches["is_last_batch"]


def out_of_patience(stop: EarlyStopping) -> bool:
    """Whether early stopping has waited for as many validations as it may: a patience of 0 is spent by the first one, too."""
    return stop.wait_count >= max(stop.patience, 1)


def ends_here(trainer: Trainer) -> bool:
    """Whether training ends after this batch."""
    fit_loop = trainer.fit_loop
    loop = fit_loop.epoch_loop
    last_of_epoch = loop._num_ready_batches_reached()
    epochs = fit_loop.epoch_progress.current.processed + last_of_epoch  # Lightning counts this one after its validation
    if fit_loop.max_steps != -1 and loop.global_step >= fit_loop.max_steps:
        return True
    if last_of_epoch and fit_loop.max_epochs not in (None, -1) and epochs >= fit_loop.max_epochs:
        return True
    enough = epochs >= (fit_loop.min_epochs or 0) and loop.global_step >= (fit_loop.min_steps or 0)
    return trainer.should_stop and enough
