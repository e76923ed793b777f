"""Runs jobs: in this process for speed, and as a command where the command itself is what is tested."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

from benchmarks.jobs import ROOT, configure
from tests.forks import Fork

__all__ = ["QUICK", "ROOT", "SMALL_DDPM", "begin", "command", "configure", "free_port", "result", "run_here", "torchrun"]
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


def free_port() -> int:
    """Returns a port that nothing listens at now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(count: int, *overrides: str, cwd: Path, script: str = "train.py") -> subprocess.CompletedProcess:
    """Runs a command in ``count`` processes as torchrun would: what Lightning begins has everything to import.

    Returns what all of them have printed, and the largest of their codes.
    """
    common = {
        "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "GROUP_RANK": 0,
    }  # fmt: skip
    begun = []
    for rank in range(count):
        variables = common | {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": "tests"}
        begun.append(begin(*overrides, cwd=cwd, script=script, **{name: str(value) for name, value in variables.items()}))
    done = [process.finish(timeout=240) for process in begun]
    output, errors = ("".join(getattr(one, name) for one in done) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(done[0].args, max(abs(one.returncode) for one in done), output, errors)


def result(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text())
