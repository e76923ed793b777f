"""Runs jobs: in this process for speed, and as a command where the command itself is what is tested."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.jobs import ROOT, configure

__all__ = ["QUICK", "ROOT", "SMALL_DDPM", "command", "configure", "heed_ctrl_c", "result", "run_here"]
QUICK = (
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.max_epochs=2",
    "trainer.check_val_every_n_epoch=1",
    "trainer.log_every_n_steps=5",
    "callbacks.pictures.num=4",
)
SMALL_DDPM = ("model=ddpm", "model.num_steps=8", "model.network.hidden_dim=32")


def run_here(directory: Path, *overrides: str) -> float:
    """Runs a job in this process."""
    from runs.job import run

    return run(configure(directory, *QUICK, *overrides))


def command(*overrides: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs ``python train.py ...`` from ``cwd``, without an account, with these environment variables besides."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "PL_"))}
    environment |= {"HOME": str(cwd), "NETRC": str(cwd / "netrc"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *overrides],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def heed_ctrl_c() -> None:
    """For a child process that is to be interrupted: background shells make their children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def result(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text())
