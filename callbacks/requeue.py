"""A SLURM job whose time is nearly up keeps its place: last.ckpt is written, and the job is put back in the queue."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_modules.sharding import sharded_parts


class Requeue(Checkpoint):
    """On SIGUSR1 all ranks stop behind the same batch, a checkpoint is written, and ``scontrol requeue`` is called.

    Lightning's own handler saves where the signal finds each rank, amid a step or a validation, and ranks that are found in
    different places wait for each other forever. Here they agree where the loss is logged and the device is waited for anyway.

    Given after the run's own checkpoint callback, it finds last.ckpt written; sharded weights are gathered by all ranks here.
    """

    def __init__(self) -> None:
        self._asked = self._agreed = False
        self._looked_at = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listens for the signal."""
        if stage == "fit":
            signal.signal(signal.SIGUSR1, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends training as SIGTERM would, if a rank was asked to."""
        step = trainer.global_step
        if step == self._looked_at or step % trainer.log_every_n_steps:
            return
        self._looked_at = step
        asked = torch.tensor(float(self._asked), device=pl_module.device)
        self._agreed = bool(trainer.strategy.reduce(asked, reduce_op="sum"))
        if self._agreed:
            trainer._signal_connector.received_sigterm = True  # looked at behind this batch, on every rank

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Puts the job back in the queue, if that is why training ends."""
        if not self._agreed:
            return
        if sharded_parts(pl_module):
            trainer.save_checkpoint(Path(trainer.checkpoint_callback.dirpath) / "last.ckpt")
        if trainer.is_global_zero:
            job = os.environ["SLURM_JOB_ID"]
            if "SLURM_ARRAY_JOB_ID" in os.environ:
                job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
            print(f"SLURM job {job} is put back in the queue at step {trainer.global_step}", flush=True)
            subprocess.run(["scontrol", "requeue", job], check=True)
