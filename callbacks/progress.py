"""Progress that suits where it is read: a live bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme


class LineProgress(ProgressBar):
    """Prints one line after a validation, at most every ``seconds``, and one in between where nothing else was said for long.

    Args:
        seconds: the shortest time between two lines.
        patience: seconds after which a line comes without a validation.
    """

    def __init__(self, seconds: float = 5.0, patience: float = 60.0) -> None:
        super().__init__()
        self.seconds, self.patience = seconds, patience
        self.start = self.last = time.monotonic()

    def disable(self) -> None:
        """Asked for on ranks above 0, which print nothing in any case."""

    def enable(self) -> None:
        """Asked for on rank 0."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self.start = self.last = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prints where training is, if that was not said for long."""
        if self._due(trainer, self.patience):
            self._say(f"{_epoch(trainer)}   step {trainer.global_step}{_bound(trainer, 'train')}")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Prints where a long validation is."""
        if self._due(trainer, self.patience):
            self._say(f"validation   batch {batch_idx + 1}/{trainer.num_val_batches[dataloader_idx]}")

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Prints where a long test is."""
        if self._due(trainer, self.patience):
            self._say(f"test   batch {batch_idx + 1}/{trainer.num_test_batches[dataloader_idx]}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the epoch, the step and the validation bound."""
        if self._due(trainer, self.seconds):
            self._say(f"{_epoch(trainer)}   step {trainer.global_step}{_bound(trainer, 'val')}")

    def _due(self, trainer: Trainer, seconds: float) -> bool:
        return time.monotonic() - self.last >= seconds and trainer.is_global_zero and not trainer.sanity_checking

    def _say(self, text: str) -> None:
        self.last = time.monotonic()
        print(f"{text}   {self.last - self.start:.0f} s", flush=True)


def _epoch(trainer: Trainer) -> str:
    total = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
    return f"epoch {trainer.current_epoch + 1}{total}"


def _bound(trainer: Trainer, stage: str) -> str:
    metrics = trainer.callback_metrics
    name = next((name for name in (f"{stage}/bpd", f"{stage}/elbo") if name in metrics), None)
    return f"   {name} {metrics[name]:.3f}" if name else ""


class LiveProgress(RichProgressBar):
    """Rich's bar, moved once in a while, where Lightning's gathers figures after every batch and is drawn as often as it can.

    Args:
        seconds: the shortest time between two moves in training; each takes some 3 ms of one core.
        **settings: of Lightning's bar.
    """

    def __init__(self, seconds: float = 1.0, **settings: Any) -> None:
        # a refresh_rate of 1 would do, but its thread sleeps for as long when it is asked to end
        super().__init__(refresh_rate=10, theme=RichProgressBarTheme(metrics_format=".3f"), **settings)
        self.seconds, self._moved = seconds, 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar, if it is time to or the epoch ends."""
        now = time.monotonic()
        if now - self._moved >= self.seconds or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._moved = now
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def progress_bar() -> ProgressBar:
    """Returns :class:`LiveProgress` on a terminal, and :class:`LineProgress` elsewhere."""
    return LiveProgress() if sys.stdout.isatty() else LineProgress()
