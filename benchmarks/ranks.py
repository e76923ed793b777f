"""Seconds a step of a real job on one and on two processes: ``trainer=ddp_cpu``, one thread each, one global batch."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.jobs import ROOT, configure
from benchmarks.scaling_cases import TrainingStep
from runs.build import build_part

MODEL = ("data=digits", "model=ddpm", "model/network=unet_8x8")
JOB = (
    *MODEL, "trainer.max_epochs=-1",
    "trainer.limit_val_batches=0", "trainer.limit_test_batches=1", "model.test_calls=2", "trainer.log_every_n_steps=20",
    "~callbacks.pictures", "logger.mode=disabled", "+callbacks.times._target_=benchmarks.ranks.StepTimes",
)  # fmt: skip
WARM_UP = 5  # steps that are not counted: DDP learns the graph, and rebuilds its buckets


class StepTimes(Callback):
    """Writes rank 0's median seconds a step to ``step_seconds.json`` in the current directory."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes the time."""
        self.starts.append(time.perf_counter())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the median of the steps after the warm-up."""
        if trainer.is_global_zero:
            seconds = [b - a for a, b in zip(self.starts[WARM_UP:], self.starts[WARM_UP + 1 :], strict=False)]
            Path("step_seconds.json").write_text(json.dumps(statistics.median(seconds)))


def step_seconds(steps: int, *overrides: str) -> float:
    """Trains digits' U-Net for ``steps`` steps on processes of one thread."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "PL_"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), *JOB, *overrides, f"trainer.max_steps={steps}"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return json.loads((Path(folder) / "step_seconds.json").read_text())


def apart(steps: int) -> float:
    """Two jobs of half the batch at the same time, that know nothing of each other: what the machine allows two ranks."""
    with ThreadPoolExecutor(2) as pool:
        half = ("trainer=cpu", "data.batch_size=64")
        jobs = [pool.submit(step_seconds, 2 * steps, *half) for _ in range(2)]  # of half the time each
        return statistics.mean(job.result() for job in jobs)


def memory(devices: int) -> int:
    """Returns the bytes that each process holds: its rows' activations, and a whole model with gradients in DDP's buckets."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = configure(Path(folder), *MODEL)
    return TrainingStep(build_part(cfg.model), cfg.data.batch_size // devices).memory()


def in_turns(rounds: int, steps: int) -> dict[str, list[float]]:
    """Returns seconds a step of each round, what comes first changing: on one process, on two, and on two apart."""
    kinds = {
        "one": lambda: step_seconds(steps, "trainer=ddp_cpu", "trainer.devices=1"),
        "two": lambda: step_seconds(steps, "trainer=ddp_cpu", "trainer.devices=2"),
        "apart": lambda: apart(steps),
    }
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(rounds):
        for name in list(kinds)[:: -1 if turn % 2 else 1]:
            found[name].append(kinds[name]())
    return found
