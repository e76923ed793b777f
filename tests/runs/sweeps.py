"""Sweeps as tests run them."""

import time

from tests.jobs import QUICK, SMALL_DDPM, begin
from tests.runs.ranks import RECORD

JOB = [*QUICK, "callbacks.pictures=null", "model.num_steps=20", *(item for item in SMALL_DDPM if "num_steps" not in item)]
RANKS = [*(item for item in JOB if "devices" not in item), *RECORD]
LONG = [*JOB, "logger=csv", "trainer.max_epochs=15", "model/lr_scheduler=constant"]


def sweeps(directory):
    return sorted(path for path in (directory / "outputs" / "sweeps").iterdir() if path.is_dir())


def wandb_files(directory):
    return sorted((directory / "outputs" / "wandb").glob("offline-run-*/run-*.wandb"))


def start(overrides, directory, number=1):
    """``python train.py ...``, once the first ``number`` last.ckpt of its sweep are there."""
    process = begin(*overrides, cwd=directory)
    deadline = time.monotonic() + 120
    while len(checkpoints(directory)) < number and time.monotonic() < deadline:
        time.sleep(0.1)
    return process


def checkpoints(directory):
    return list(directory.glob("outputs/sweeps/*/*/checkpoints/last.ckpt"))
