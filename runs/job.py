"""One training job: compose -> seed -> data -> model -> loggers -> trainer -> fit -> test -> result.json and a table."""

from __future__ import annotations

import logging
import math
import os
import shlex
import signal
import sys
import time
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from callbacks import EMA, RunCheckpoint, StopsBehindBatches, WholeSteps, all_finite, diverged
from lightning_modules import LikelihoodModule
from loggers import MetricsCSV, finish_wandb, wandb_logger
from losses.elbo import nats_to_bits_per_dim
from runs.build import SettingError, build_part, factory, plain
from runs.devices import compile_networks
from runs.directory import (
    CONFIG,
    FORMAT,
    LAST,
    RESULT,
    claim,
    enough_epochs,
    find_checkpoint,
    hold,
    read_checkpoint,
    same_batches,
    same_data,
    same_model,
    same_optimizer,
    write_json,
)
from runs.report import code_version, facts_to_group_by, result_record, table, totals


def run(cfg: DictConfig) -> float:
    """Runs the job that ``cfg`` describes, in Hydra's output directory.

    Returns:
        The best validation figure, what sweepers minimise (the test set chooses nothing): bits/dim, or -ELBO in nats for
        continuous data.

    Raises:
        SettingError: for a setting that cannot work, before training.
    """
    directory = Path(HydraConfig.get().runtime.output_dir)
    with nullcontext() if is_child_rank() else hold(directory):
        return run_in(directory, cfg)


def run_in(directory: Path, cfg: DictConfig) -> float:
    """Runs the job in a directory that is held for it."""
    started = time.monotonic()
    quiet_libraries()
    config = plain(cfg)
    checkpoint, step = choose_checkpoint(cfg, config, directory)
    check_settings(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = load_data(cfg.data)
    model: LikelihoodModule = build_part(cfg.model)
    compile_networks(model, cfg.compile)
    failed = True
    try:
        trainer = build_trainer(cfg, config, directory, step)
        if not is_child_rank():  # only now: a job that was refused has claimed nothing, and may be tried again here
            OmegaConf.save(OmegaConf.create(config), directory / CONFIG)
        say(trainer, f"{describe(cfg, model, datamodule)}\nrun directory: {directory}")
        fit(trainer, model, datamodule, checkpoint, directory)
        best = objective(trainer, model)
        test(trainer, model, datamodule, directory, cfg, started, best)
        failed = False
        return best
    except SystemExit as end:
        if type(end) is SystemExit and end.code == 1:  # how Lightning's trainer ends after Ctrl-C
            raise KeyboardInterrupt from None
        failed = type(end) is not SystemExit or bool(end.code)  # 0: of a callback that has done what the job was for
        raise
    finally:
        finish_wandb(failed)


def quiet_libraries() -> None:
    """Leaves of Lightning's lines the warnings, once each: what a run does is said here, in fewer words."""
    lightning = logging.getLogger("lightning")
    lightning.handlers.clear()  # Hydra's root handler prints them already
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # what +trainer.profiler=simple has found
    for message in (
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        ".*smaller than the logging interval.*",
        ".*exists and is not empty.*",
        ".*FSDP2-wrapped module.*returned a view tensor.*",  # nothing writes to what a network returns
        ".*It is recommended to use `self.log.*sync_dist=True.*",  # the metric has reduced over ranks already
    ):
        warnings.filterwarnings("ignore", message)


@rank_zero_only
def say(trainer: Trainer, text: str) -> None:
    """Prints once, on rank 0."""
    print(text, flush=True)


def describe(cfg: DictConfig, model: LikelihoodModule, datamodule: LightningDataModule) -> str:
    """Returns the line a run starts with: what is trained on what."""
    choices = HydraConfig.get().runtime.choices
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"model={choices.model} ({parameters:,} parameters)  data={datamodule.describe()}  seed={cfg.seed}"


def check_settings(cfg: DictConfig) -> None:
    """Refuses what the libraries below would refuse late, or with a traceback."""
    if not isinstance(cfg.seed, int) or not 0 <= cfg.seed < 2**32:
        raise SettingError(f"seed={cfg.seed}: give an integer from 0 to 4294967295")
    if str(cfg.trainer.precision) in ("bf16-true", "16-true", "bf16", "16"):
        raise SettingError(f"trainer.precision={cfg.trainer.precision} is not supported: choose bf16-mixed or 32-true")
    clipped = cfg.trainer.get("gradient_clip_val") and cfg.model.optimizer.get("fused")
    if str(cfg.trainer.precision) == "16-mixed" and clipped:
        raise SettingError(
            "trainer.precision=16-mixed scales gradients, which a fused optimiser takes back only after they are clipped: "
            "choose bf16-mixed, or add model.optimizer.fused=false"
        )
    if (cfg.trainer.get("gradient_clip_val") or 0) < 0:
        raise SettingError(f"trainer.gradient_clip_val={cfg.trainer.gradient_clip_val} must not be negative; null: no clipping")
    if cfg.trainer.get("overfit_batches"):
        raise SettingError(
            f"trainer.overfit_batches={cfg.trainer.overfit_batches} is not supported, as Lightning would replace the order of "
            "the data: set trainer.limit_train_batches and trainer.limit_val_batches"
        )
    if cfg.model.optimizer.get("lr", 1.0) <= 0:
        raise SettingError(f"model.optimizer.lr={cfg.model.optimizer.lr} must be above 0")


def load_data(cfg: DictConfig) -> LightningDataModule:
    """Builds the data module and reads the data now: what is missing is said before anything else is built."""
    datamodule: LightningDataModule = build_part(cfg)
    try:
        if not is_child_rank():
            datamodule.prepare_data()
        datamodule.setup()
        datamodule.train_dataloader()  # refuses a batch larger than the data here, not in the middle of fit
    except (ValueError, OSError) as error:
        raise SettingError(" ".join(str(error).split())) from error
    return datamodule


def is_child_rank() -> bool:
    """Whether this process is not the first of its job: by Lightning's, torchrun's or SLURM's word."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("LOCAL_RANK", "NODE_RANK", "RANK", "GROUP_RANK", "SLURM_PROCID"))


def choose_checkpoint(cfg: DictConfig, config: dict[str, Any], directory: Path) -> tuple[Path | None, int]:
    """Returns the checkpoint to continue from, if any, and its step; refuses a directory that holds another run."""
    choices = HydraConfig.get().runtime.choices
    checkpoint, step, here = None, 0, directory / LAST
    if cfg.ckpt == "auto":
        checkpoint = here if here.is_file() else None
    elif cfg.ckpt is not None:
        suffix = f"-{choices.model}-{choices.data}"
        checkpoint = find_checkpoint(str(cfg.ckpt), directory, Path(cfg.paths.output_dir), suffix)
    if checkpoint is not None:
        held = read_checkpoint(checkpoint, "ckpt")
        same_model(held["config"], config, checkpoint)
        same_data(held["config"], config, checkpoint)
        same_optimizer(held["config"], config, checkpoint)
        enough_epochs(held, cfg.trainer.max_epochs, checkpoint)
        same_batches(held, config, checkpoint)
        step = held["global_step"]
        if not all_finite(value for value in held["state_dict"].values() if isinstance(value, torch.Tensor)):
            raise SettingError(
                f"ckpt={checkpoint} holds weights that are not finite: give an earlier one, or start without ckpt"
            )
    if not is_child_rank():
        own = checkpoint is not None and directory in checkpoint.absolute().parents
        claim(directory, continuing=own or cfg.ckpt == "auto")
    return checkpoint, step


def build_trainer(cfg: DictConfig, config: dict[str, Any], directory: Path, step: int = 0) -> Trainer:
    """Builds callbacks, loggers and the trainer; devices and precision that do not exist here are refused in one sentence."""
    callbacks = build_callbacks(cfg, config, directory)
    loggers = build_loggers(cfg, config, directory, step)
    try:
        return factory(cfg.trainer)(callbacks=callbacks, logger=loggers, default_root_dir=str(directory))
    except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
        raise SettingError(f"trainer: {' '.join(str(error).split())}") from error


def build_callbacks(cfg: DictConfig, config: dict[str, Any], directory: Path) -> list[Callback]:
    """Builds conf/callbacks, and the checkpoint callback unless checkpoints are off."""
    parts = {name: part for name, part in cfg.callbacks.items() if part is not None}
    if cfg.trainer.get("enable_progress_bar") is False:
        parts.pop("progress", None)
    callbacks = [build_part(part) for part in parts.values()]
    if cfg.trainer.get("enable_checkpointing", True) and not cfg.trainer.get("fast_dev_run"):
        kept = {name: config[name] for name in ("model", "data", "seed")}
        callbacks += [RunCheckpoint(str(directory / "checkpoints"), kept, FORMAT), WholeSteps()]
    return callbacks


def build_loggers(cfg: DictConfig, config: dict[str, Any], directory: Path, step: int) -> list[Logger]:
    """Builds metrics.csv, as it was at ``step``, and the logger that conf/logger chose; ranks above 0 log nothing."""
    loggers: list[Logger] = [MetricsCSV(str(directory / "metrics.csv"), step)]
    if cfg.logger and not is_child_rank():
        build = factory(cfg.logger)
        try:
            if build.func is wandb_logger:
                build = partial(build, config={**config, **facts_to_group_by(directory)}, id_file=str(directory / "wandb_id"))
            loggers.append(build())
        except ValueError as error:
            raise SettingError(str(error)) from error
    return loggers


def fit(
    trainer: Trainer, model: LikelihoodModule, datamodule: LightningDataModule, checkpoint: Path | None, directory: Path
) -> None:
    """Trains; Ctrl-C and SIGTERM leave last.ckpt and say how to go on."""
    if checkpoint is not None:
        say(trainer, f"continuing from {checkpoint}")
    try:
        trainer.fit(model, datamodule, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException:  # of Ctrl-C, too, that waited for the end of a step
        stops = (callback for callback in trainer.callbacks if isinstance(callback, StopsBehindBatches))
        if not is_child_rank() and any(stop.stopped_by == signal.SIGINT for stop in stops):
            raise KeyboardInterrupt from None
        raise
    except (ValueError, FloatingPointError) as error:  # also of a callback that saw training diverge
        raise SettingError(" ".join(str(error).split())) from error
    finally:
        saver = trainer.checkpoint_callback
        if getattr(saver, "interrupted", False):
            kept = f" from step {saver.kept_step}" if saver.kept_step != trainer.global_step else ""
            say(trainer, f"\ninterrupted at step {trainer.global_step}; to go on{kept}:\n  {resume_command(directory)}")


def resume_command(directory: Path) -> str:
    """Returns the command that continues this job in its own directory."""
    overrides = [item for item in HydraConfig.get().overrides.task if not item.startswith("ckpt=")]
    return shlex.join(["python", sys.argv[0], *overrides, f"hydra.run.dir={directory}", "ckpt=last"])


def objective(trainer: Trainer, model: LikelihoodModule) -> float:
    """Returns the best validation figure of the run; the last one if no checkpoint was kept; NaN if there was no validation."""
    elbo = getattr(trainer.checkpoint_callback, "best_model_score", None)
    elbo = trainer.callback_metrics.get("val/elbo") if elbo is None else elbo
    if elbo is None:
        return math.nan
    if not math.isfinite(elbo):
        raise SettingError(str(diverged(f"val/elbo is {float(elbo)}", trainer.global_step)))  # without checkpoints
    return -float(elbo) if model.levels is None else nats_to_bits_per_dim(-float(elbo), model.num_dims)


def test(
    trainer: Trainer,
    model: LikelihoodModule,
    datamodule: LightningDataModule,
    directory: Path,
    cfg: DictConfig,
    started: float,
    best_figure: float,
) -> None:
    """Tests the best weights, writes result.json and prints the table."""
    session, step = time.monotonic() - started, trainer.global_step
    best = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
    metrics = trainer.test(model, datamodule, ckpt_path=best, verbose=False, weights_only=True)[0]
    metrics.pop("images_seen", None)  # no figure of the test set
    facts = {
        "weights": "ema" if any(isinstance(callback, EMA) for callback in trainer.callbacks) else "raw",
        "checkpoint": Path(best).name if best else None,
        "step": step,
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "protocol": {**datamodule.protocol(), **model.protocol()},
        "choices": {key: value for key, value in HydraConfig.get().runtime.choices.items() if not key.startswith("hydra/")},
        "overrides": list(HydraConfig.get().overrides.task),
        "seed": cfg.seed,
        **code_version(),
        "devices": trainer.world_size,
        "precision": str(trainer.precision),
        **totals(trainer, session, time.monotonic() - started),
    }
    record = result_record(metrics, model.num_dims, model.levels, objective=best_figure, **facts)
    if trainer.is_global_zero:
        write_json(directory / RESULT, record)
        Console().print(table(metrics, model.num_dims, model.levels, f"test set, {facts['weights']} weights, step {step}"))
