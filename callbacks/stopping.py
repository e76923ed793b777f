"""How a job of several ranks ends before its time: all of them after the same batch, with a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.checkpoints import run_checkpoint
from lightning_modules import LikelihoodModule
from lightning_modules.base import is_logged
from lightning_modules.sharding import sharded_parts

PATIENCE = 10.0  # seconds: SLURM may send a signal to a task twice, by srun and by itself


class StopsAfterBatch(Checkpoint):
    """Ends training where Lightning ends it at SIGTERM: after a batch, and after the validation that is due there.

    Nowhere else do all of Lightning's counts agree, by which a resumed run knows where it goes on. It is a ``Checkpoint``,
    because Lightning calls those after all other callbacks.

    Attributes:
        stopped_by: the signal that training was stopped by; 0 if it was not.
    """

    stopped_by = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets what an earlier training was stopped by."""
        self.stopped_by = 0

    def _stop(self, trainer: Trainer, number: int) -> None:
        self.stopped_by = number
        trainer._signal_connector.received_sigterm = True  # looked at after this batch

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets a validation that is due after the last batch end: cut short, it would be done again."""
        if self.stopped_by:
            trainer._signal_connector.received_sigterm = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops after it."""
        if self.stopped_by:
            trainer._signal_connector.received_sigterm = True


class StopTogether(StopsAfterBatch):
    """Notes SIGTERM and Ctrl-C, and lets the ranks agree to stop where the loss is logged and the device is waited for anyway.

    Lightning broadcasts from within the handler, where ranks that the signal found in different places wait for each other
    forever, and has all ranks wait for a broadcast at every batch. It also saves there when SLURM's time is up. Here SIGUSR1 is
    noted too if ``requeue``, and the job put back in the queue once it has stopped. A second Ctrl-C ends the rank at once, and
    so does another signal after ``PATIENCE``: a rank that hangs never agrees.

    Given after the run's own checkpoint callback, it finds last.ckpt written, but for sharded weights.

    Args:
        requeue: whether this is a job of SLURM that may come back.
    """

    def __init__(self, requeue: bool = False) -> None:
        self.requeue = requeue
        self._asked = self._looked_at = 0  # the signal that this rank was sent, and the step at which ranks last agreed
        self._since = 0.0  # when it was sent

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens in Lightning's place, whose handlers are set by now."""
        super().on_train_start(trainer, pl_module)
        self._asked = self._looked_at = 0
        if threading.current_thread() is not threading.main_thread():  # which alone may listen
            return
        heard = [signal.SIGUSR1] if self.requeue else []
        if trainer.world_size > 1:
            heard.append(signal.SIGTERM)
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        if trainer.world_size > 1 or sharded_parts(pl_module):  # saving what is sharded takes every rank
            heard.append(signal.SIGINT)
        for number in heard:
            if callable(signal.getsignal(number)) or number != signal.SIGINT:  # in a shell's background it is ignored
                signal.signal(number, self._ask)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens in the validation that a run goes on with, before it trains."""
        super().on_validation_start(trainer, pl_module)
        self._end_alone(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens in the test."""
        self._end_alone(trainer)

    def _end_alone(self, trainer: Trainer) -> None:
        """Has SIGTERM end this rank after its batch where ranks do not agree: those that wait for it see it go."""
        listening = signal.getsignal(signal.SIGTERM) == self._ask
        if trainer.world_size > 1 and not listening and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, partial(self._end, trainer))

    @staticmethod
    def _end(trainer: Trainer, number: int, _: Any) -> None:
        launcher = trainer.strategy.launcher
        if launcher is not None and not trainer.received_sigterm:
            launcher.kill(number)  # the ranks that this one has begun
        trainer._signal_connector.received_sigterm = True

    def _ask(self, number: int, _: Any) -> None:
        if self._asked and (number == signal.SIGINT or time.monotonic() - self._since > PATIENCE):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self._asked:
            self._asked, self._since = number, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LikelihoodModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends training after this batch, if a rank was asked to."""
        step = trainer.global_step
        if step == self._looked_at or not is_logged(trainer, step):
            return
        self._looked_at = step
        if agreed := self._agree(trainer, pl_module):
            pl_module.before_stop()
            self._stop(trainer, agreed)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops before the test, if a rank was asked to after they last agreed."""
        if agreed := self._agree(trainer, pl_module):
            self.stopped_by = agreed
            raise SIGTERMException

    def _agree(self, trainer: Trainer, pl_module: LightningModule) -> int:
        """Returns the signal that a rank was sent, on all of them; 0 if none was."""
        asked = torch.tensor(float(self._asked), device=pl_module.device)
        return int(trainer.strategy.reduce(asked, reduce_op="max"))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves what is sharded, and puts a job of SLURM back in the queue."""
        if not self.stopped_by:
            return
        saver = run_checkpoint(trainer)
        if saver is not None and sharded_parts(pl_module):
            saver.interrupted = True
            trainer.save_checkpoint(Path(saver.dirpath) / f"last{saver.FILE_EXTENSION}")
            saver.kept_step = trainer.global_step
        if self.stopped_by == signal.SIGUSR1 and trainer.is_global_zero:
            job = os.environ["SLURM_JOB_ID"]
            if "SLURM_ARRAY_JOB_ID" in os.environ:
                job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
            print(f"SLURM job {job} is put back in the queue at step {trainer.global_step}", flush=True)
            subprocess.run(["scontrol", "requeue", job], check=True)
