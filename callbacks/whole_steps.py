"""Ctrl-C stops after a training step, not within one, so that a resumed run ends where an uninterrupted one would."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from callbacks.stopping import StopsAfterBatch


class WholeSteps(StopsAfterBatch):
    """Holds the first Ctrl-C back until a step is complete, with its averages and figures; the second one is not held back.

    Between two steps, too. A validation is cut off, but for one that Ctrl-C came just before, which ends first.

    Only on one device: several have to agree (:class:`callbacks.StopTogether`).
    """

    def __init__(self) -> None:
        self._usual: Any = None
        self._held = self._asked = self._terminated = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes Ctrl-C over, if there is anything to take over: once, as a change of handlers in every step costs time."""
        super().on_train_start(trainer, pl_module)
        usual = signal.getsignal(signal.SIGINT)
        self._usual, self._held, self._asked, self._terminated = None, True, False, False
        if trainer.world_size == 1 and callable(usual) and threading.current_thread() is threading.main_thread():
            self._usual = usual
            signal.signal(signal.SIGINT, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not self._held:
            self._usual(number, frame)
            return
        self._asked = True
        self._give_back()

    def _give_back(self) -> None:
        if self._usual is not None and signal.getsignal(signal.SIGINT) == self._hear:
            signal.signal(signal.SIGINT, self._usual)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if self._asked:
            self._stop(trainer, signal.SIGINT)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops after this batch, if it ended in an optimiser step: gradients that are being accumulated are not saved.

        At SIGTERM, too, which Lightning has noted.
        """
        noted = trainer._signal_connector
        if trainer.fit_loop.epoch_loop._should_accumulate():
            self._terminated |= noted.received_sigterm
            noted.received_sigterm = False
        else:
            noted.received_sigterm |= self._terminated
            self._stop_if_asked(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on Ctrl-C does not wait, if it has not come yet."""
        super().on_validation_start(trainer, pl_module)
        self._held = False

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on it waits again: what follows weighs the figure and saves, and one without the other would be a lie."""
        self._held = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops after the validation."""
        super().on_validation_end(trainer, pl_module)
        self._stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives Ctrl-C back, which came after the last batch if it came and nothing has stopped."""
        self._give_back()
        if self._asked and not self.stopped_by:
            raise KeyboardInterrupt

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives Ctrl-C back."""
        self._held = False
        if not isinstance(exception, KeyboardInterrupt):  # after which Lightning has it ignored
            self._give_back()
