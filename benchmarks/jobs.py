"""A training job of this framework as ``train.py`` would build it, whose trainer takes turns with another loop."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig, open_dict
from torch import Tensor

from benchmarks.paired import Pairs, timed
from callbacks import run_checkpoint
from callbacks.progress import LineProgress, LiveProgress
from datamodules.base import ImageDataModule
from lightning_modules import LikelihoodModule
from loggers import finish_wandb
from runs.build import build_part, plain
from runs.commands import CONF
from runs.data import load_data
from runs.job import build_loggers, build_trainer, fit
from runs.speech import quiet_libraries

ROOT = Path(__file__).parents[1]


def configure(directory: Path, *overrides: str) -> DictConfig:
    """Composes a job as ``train.py`` would, its run directory below ``directory``."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"paths.output_dir={directory}", *overrides], return_hydra_config=True)
    run_directory = directory / "run"
    run_directory.mkdir(parents=True, exist_ok=True)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(run_directory)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


class Turns(Callback):
    """Every ``steps`` batches the trainer rests while another loop does as many; validation is left out of both.

    Args:
        other: number of steps -> seconds that they took.
        steps: of a turn.
    """

    def __init__(self, other: Callable[[int], float], steps: int) -> None:
        self.other, self.steps = other, steps
        self.batches, self.paused, self.validating = 0, 0.0, 0.0
        self.since: float | None = None
        self.ours: list[float] = []
        self.theirs: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ends a turn of the trainer's, and gives the other loop its own."""
        if self.batches % self.steps == 0:
            if self.since is not None:
                self.ours.append((time.perf_counter() - self.since - self.paused) / self.steps)
                self.theirs.append(self.other(self.steps) / self.steps)
            self.since, self.paused = time.perf_counter(), 0.0
        self.batches += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self.validating = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts it again; checkpoints are written after this, and count."""
        self.paused += time.perf_counter() - self.validating

    def pairs(self) -> Pairs:
        """Returns all turns but the first, in which both warm up."""
        return Pairs(self.ours[1:], self.theirs[1:])


@dataclass(frozen=True, eq=False)
class Job:
    """A job that is ready to run."""

    cfg: DictConfig
    datamodule: ImageDataModule
    model: LikelihoodModule
    directory: Path

    @classmethod
    def build(
        cls, directory: Path, *overrides: str, data: ImageDataModule | None = None, model: LikelihoodModule | None = None
    ) -> Job:
        """Composes a job for one CPU process, and builds the config's data and model where none are given."""
        quiet_libraries()
        own = ("trainer.accelerator=cpu", "trainer.devices=1", "callbacks.pictures.every_n_epochs=0", "logger.mode=offline")
        cfg = configure(directory, *own, *overrides)
        seed_everything(cfg.seed, verbose=False)
        return cls(cfg, data or load_data(cfg.data), model or build_part(cfg.model), directory / "run")

    def run(self, *callbacks: Callback) -> Trainer:
        """Trains with everything on: progress bar, W&B offline, metrics.csv, terms of the ELBO, EMA, clipping, checkpoints."""
        config = plain(self.cfg)
        trainer = build_trainer(self.cfg, config, self.directory)
        trainer.loggers = build_loggers(self.cfg, config, self.directory)
        for place, callback in enumerate(trainer.callbacks):
            if isinstance(callback, LineProgress):  # what a terminal would get, drawn to nowhere
                bar = LiveProgress(console_kwargs={"file": io.StringIO(), "force_terminal": True})
                trainer.callbacks[place] = bar
        place = trainer.callbacks.index(run_checkpoint(trainer))
        trainer.callbacks[place:place] = callbacks  # before it: writing checkpoints counts
        try:
            fit(trainer, self.model, self.datamodule, None, self.directory)
        finally:
            finish_wandb(False)
        return trainer

    def raw_loop(self, model: LikelihoodModule) -> Callable[[int], float]:
        """Returns a plain loop: gather, loss, backward, the same fused optimiser, and nothing else; steps -> seconds."""
        images, size, num = self.datamodule.splits["train"], self.datamodule.batch_size, self.datamodule.sizes["train"]
        optimizer = model.train().optimizer_factory(model.parameters())
        batches: list[Tensor] = []

        def step() -> None:
            if not batches:
                batches.extend(torch.randperm(num)[: num - num % size].split(size))
            loss, _ = model.objective(images.index_select(0, batches.pop()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return lambda steps: timed(lambda: [step() for _ in range(steps)])
