"""Ctrl-C stops behind a training step and not amid one, so that a resumed run ends where an uninterrupted one would."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint


class WholeSteps(Checkpoint):
    """Holds the first Ctrl-C back until a step is complete, with its averages and figures; the second one is not held back.

    Between two steps, too: Lightning's counts of batches, which say where a resumed run goes on, agree only behind a step. A
    validation is cut off, but for one that Ctrl-C came just before, which ends first.

    Only on one device: of several, some might begin a step that the others do not join. It is a ``Checkpoint``, because
    Lightning calls those after all other callbacks.
    """

    def __init__(self) -> None:
        self._usual: Any = None
        self._held = self._asked = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes Ctrl-C over, if there is anything to take over: once, as a change of handlers in every step costs time."""
        usual = signal.getsignal(signal.SIGINT)
        self._usual, self._held, self._asked = None, True, False
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

    def _stop(self) -> None:
        """Does what Ctrl-C asked for."""
        if self._asked:
            self._asked = False
            raise KeyboardInterrupt

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops here, with the step's row, which Lightning would ask the module for next."""
        if self._asked:
            pl_module.on_train_batch_end(outputs, batch, batch_idx)
            self._stop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on Ctrl-C does not wait."""
        self._held = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on it waits again. What was trained since the validation before is saved by now."""
        self._held = True
        self._stop()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives Ctrl-C back."""
        self._give_back()
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives Ctrl-C back."""
        self._held = False
        if not isinstance(exception, KeyboardInterrupt):  # after which Lightning has it ignored
            self._give_back()
