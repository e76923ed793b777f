"""Runs jobs: in this process for speed, and as a command where the command itself is what is tested."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

ROOT = Path(__file__).parents[1]
QUICK = (
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.max_epochs=2",
    "trainer.check_val_every_n_epoch=1",
    "trainer.log_every_n_steps=5",
    "callbacks.pictures.num=4",
)
SMALL_DDPM = ("model=ddpm", "model.num_steps=8", "model.network.hidden_dim=32")


def configure(directory: Path, *overrides: str):
    """Composes a job as ``train.py`` would, its run directory in ``directory``."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [f"paths.output_dir={directory}", *overrides], return_hydra_config=True)
    run_directory = directory / "run"
    run_directory.mkdir(parents=True, exist_ok=True)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(run_directory)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


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
