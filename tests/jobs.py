"""Runs jobs: in this process for speed, and as a command where the command itself is what is tested."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from benchmarks.jobs import ROOT, configure
from tests.forks import Fork

__all__ = ["QUICK", "ROOT", "SMALL_DDPM", "begin", "command", "configure", "result", "run_here"]
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


def command(*overrides: str, cwd: Path, script: str = "train.py", **variables: str) -> subprocess.CompletedProcess:
    """Runs ``python train.py ...`` from ``cwd``, without an account, with these environment variables besides."""
    return begin(*overrides, cwd=cwd, script=script, **variables).finish(timeout=240)


def begin(*overrides: str, cwd: Path, script: str = "train.py", **variables: str) -> Fork:
    """Begins a command."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "PL_"))}
    environment |= {"HOME": str(cwd), "NETRC": str(cwd / "netrc")} | variables
    return Fork([str(ROOT / script), *overrides], cwd, environment)


def result(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text())
