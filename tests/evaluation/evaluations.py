"""Trains small runs once and evaluates copies of them: in this process, or as the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from hydra import compose, initialize_config_dir

from tests.jobs import ROOT, SMALL_DDPM, run_here

MODELS = {
    "vae": ("model=vae",),
    "mhvae": ("model=mhvae",),
    "ddpm": ("model=ddpm", "model.num_steps=30", "model.network.hidden_dim=32", "trainer.max_epochs=6"),
    "short ddpm": SMALL_DDPM,
}
QUICK = ("pictures=false", "balance=false")
CPU = ("fabric.accelerator=cpu", "data_root=null")


class Runs:
    """Run directories by model."""

    def __init__(self, factory, models):
        self.factory, self.models, self.trained = factory, models, {}

    def __getitem__(self, name) -> Path:
        if name not in self.trained:
            directory = self.factory.mktemp("trained")
            run_here(directory, *self.models[name], "logger=csv", "callbacks.pictures=null", "callbacks.ema.decay=0.9")
            self.trained[name] = directory / "run"
        return self.trained[name]

    def copy(self, name, directory) -> Path:
        """A copy to evaluate: what an evaluation writes stays with its test."""
        return Path(shutil.copytree(self[name], directory / f"{name}-run"))


def configure(run, *overrides):
    """Composes an evaluation as ``evaluate.py`` would."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("evaluate", [f"run={run}", *CPU, *overrides])


def evaluate_here(run, *overrides):
    """Evaluates in this process: (figure, whether it was interrupted)."""
    from evaluation.job import run as evaluate

    return evaluate(configure(run, *overrides))


def record(run) -> dict:
    return json.loads((Path(run) / "evaluation.json").read_text())


def refuse_constant(name):
    """For ``json.loads``: refuses NaN and infinity, which are no JSON."""
    raise AssertionError(f"{name} is no JSON")
