"""One training job: compose -> seed -> data -> model -> loggers -> trainer -> fit -> test -> result.json and a table."""

from __future__ import annotations

import inspect
import math
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, LambdaCallback, Timer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from omegaconf import DictConfig, OmegaConf, flag_override

from callbacks import (
    LastValidation,
    RunCheckpoint,
    StopsAfterBatch,
    WholeSteps,
    diverged,
    out_of_patience,
    run_checkpoint,
)
from datamodules import ImageDataModule
from lightning_modules import LikelihoodModule
from loggers import MetricsCSV, finish_wandb, wandb_logger
from losses.elbo import nats_to_bits_per_dim
from runs.build import SettingError, build_part, factory, plain
from runs.commands import chosen
from runs.data import load_data
from runs.devices import compile_networks, is_child_rank
from runs.directory import CONFIG, FORMAT, LOCK, hold, hold_free, whole, withdraw_result
from runs.kinds import unknown
from runs.lifelines import end_in_peace
from runs.report import facts_to_group_by
from runs.resuming import choose_checkpoint, resume_command, same_images
from runs.settings import check_limits, check_model, check_ranks, check_settings, chosen_callbacks, only_tries
from runs.speech import one_sentence, quiet_libraries, say
from runs.testing import test


def run(cfg: DictConfig) -> float:
    """Runs the job that ``cfg`` describes, in Hydra's output directory.

    Returns:
        The best validation figure, what sweepers minimise (the test set chooses nothing): bits/dim, or -ELBO in nats for
        continuous data.

    Raises:
        SettingError: for a setting that cannot work, before training.
    """
    directory = Path(HydraConfig.get().runtime.output_dir)
    if not HydraConfig.get().run.dir:
        raise SettingError("hydra.run.dir= is empty: give the run directory, or leave it out")
    if is_child_rank():
        return run_in(directory, cfg)
    with hold_free(directory) if named_by_time(directory) else hold(directory) as place:
        if place != directory:
            hydra = HydraConfig.get()
            with flag_override(hydra, ["readonly", "struct"], False):
                hydra.runtime.output_dir = hydra.run.dir = str(place)  # the second is what Lightning gives to the other ranks
        return run_in(place, cfg)


def named_by_time(directory: Path) -> bool:
    """Whether a run directory has its name of the second in which the run began, as other runs may have."""
    hydra = HydraConfig.get()
    pattern = OmegaConf.to_container(hydra, resolve=False)["run"]["dir"]
    return "${now:" in pattern and directory == Path(hydra.run.dir).absolute()


def run_in(directory: Path, cfg: DictConfig) -> float:
    """Runs the job in a directory that is held for it."""
    started = time.monotonic()
    fresh = [path.name for path in directory.iterdir()] in ([], [LOCK])
    quiet_libraries()
    check_settings(cfg)
    config = plain(cfg)
    checkpoint, step, images = choose_checkpoint(cfg, config, directory)
    seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = load_data(cfg.data)
    same_images(images, datamodule, f"ckpt={checkpoint}")
    check_limits(cfg, datamodule)
    model: LikelihoodModule = build_part(cfg.model)
    check_model(model, datamodule.image_shape)
    compile_networks(model, cfg.compile)
    failed, trainer = True, None
    try:
        trainer = build_trainer(cfg, config, directory)
        check_ranks(trainer, model, datamodule, cfg)
        # only now: what was refused is no run, not in W&B either, and may be tried again; nor is what only tries something out
        first = describe(cfg, model, datamodule)
        if not only_tries(trainer, cfg):
            first += f"\nrun directory: {directory}"
            if not trainer.fast_dev_run:
                trainer.loggers = build_loggers(cfg, config, directory, step)
            if not is_child_rank():
                with whole(directory / CONFIG) as draft:
                    OmegaConf.save(OmegaConf.create(config), draft)
        say(trainer, first)
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
        end_in_peace()  # to end W&B's run may take a while
        finish_wandb(failed)
        in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN  # which keeps of each job how it ended
        if fresh and not in_sweep and not is_child_rank() and trainer is not None and only_tries(trainer, cfg):
            shutil.rmtree(directory, ignore_errors=True)


def describe(cfg: DictConfig, model: LikelihoodModule, datamodule: ImageDataModule) -> str:
    """Returns the line a run starts with: what is trained on what."""
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"model={chosen(cfg, 'model')} ({parameters:,} parameters)  data={datamodule.describe()}  seed={cfg.seed}"


def build_trainer(cfg: DictConfig, config: dict[str, Any], directory: Path) -> Trainer:
    """Builds callbacks and the trainer; devices and precision that do not exist here are refused in one sentence."""
    callbacks = build_callbacks(cfg, config, directory)
    try:
        return factory(cfg.trainer)(callbacks=callbacks, logger=False, default_root_dir=str(directory))
    except (MisconfigurationException, ImportError, TypeError, ValueError, RuntimeError) as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found and found[1] in cfg.trainer:
            raise SettingError(unknown(cfg.trainer, found[1], inspect.signature(Trainer).parameters)) from None
        name = "devices" if "devices" in str(error) else "accelerator" if isinstance(error, ImportError) else None
        setting = f".{name}={cfg.trainer[name]}" if name else ""
        raise SettingError(f"trainer{setting}: {' '.join(str(error).split())}") from error


def build_callbacks(cfg: DictConfig, config: dict[str, Any], directory: Path) -> list[Callback]:
    """Builds conf/callbacks, the validation at the end, and the checkpoint callback unless checkpoints are off."""
    parts = chosen_callbacks(cfg)
    if cfg.trainer.get("enable_progress_bar") is False:
        parts.pop("progress", None)
    callbacks = []
    for name, part in parts.items():
        callbacks.append(build_part(part))
        if not isinstance(callbacks[-1], Callback):
            raise SettingError(f"callbacks.{name}._target_={part._target_}: derive it from lightning's Callback")
    callbacks.append(LastValidation())
    if not cfg.trainer.get("fast_dev_run") and not is_child_rank():
        callbacks.append(LambdaCallback(on_train_start=lambda *_: withdraw_result(directory)))
    if cfg.trainer.get("enable_checkpointing", True) and not cfg.trainer.get("fast_dev_run"):
        kept = {name: config[name] for name in ("model", "data", "seed")}
        callbacks += [RunCheckpoint(str(directory / "checkpoints"), kept, FORMAT), WholeSteps()]
    return callbacks


def build_loggers(cfg: DictConfig, config: dict[str, Any], directory: Path, step: int = 0) -> list[Logger]:
    """Builds metrics.csv, as it was at ``step``, and the logger that conf/logger chose; ranks above 0 log nothing."""
    loggers: list[Logger] = [MetricsCSV(str(directory / "metrics.csv"), step)]
    if cfg.get("logger") and not is_child_rank():
        build = factory(cfg.logger)
        try:
            if build.func is wandb_logger:
                build = partial(build, config={**config, **facts_to_group_by(directory)}, id_file=str(directory / "wandb_id"))
            loggers.append(build())
        except (ValueError, ImportError) as error:
            reason = " ".join(str(error).split())
            if "`tensorboard`" in reason:  # Lightning first advises another package, which nobody needs
                reason = "tensorboard is not installed: pip install -e '.[tensorboard]'"
            raise SettingError(f"logger: {reason}") from error
    return loggers


def fit(
    trainer: Trainer, model: LikelihoodModule, datamodule: ImageDataModule, checkpoint: Path | None, directory: Path
) -> None:
    """Trains; Ctrl-C and SIGTERM leave last.ckpt and say how to go on."""
    if checkpoint is not None:
        say(trainer, f"continuing from {checkpoint}")
    try:
        with one_sentence(trainer):
            trainer.fit(model, datamodule, ckpt_path=checkpoint, weights_only=True)
        if reason := ended_early(trainer):
            say(trainer, reason)
    except SIGTERMException:  # of Ctrl-C, too, that waited for the end of a step
        stops = (callback for callback in trainer.callbacks if isinstance(callback, StopsAfterBatch))
        if not is_child_rank() and any(stop.stopped_by == signal.SIGINT for stop in stops):
            raise KeyboardInterrupt from None
        raise
    finally:
        saver = run_checkpoint(trainer)
        if saver is not None and saver.interrupted:
            kept = f" from step {saver.kept_step}" if saver.kept_step != trainer.global_step else ""
            say(trainer, f"\ninterrupted at step {trainer.global_step}; to go on{kept}:\n  {resume_command(directory)}")


def ended_early(trainer: Trainer) -> str | None:
    """Returns why training ended before the length that was asked for; ``None`` if it did not."""
    where = f"after step {trainer.global_step}, epoch {trainer.current_epoch}"
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping) and (callback.stopped_epoch or out_of_patience(callback)):
            reason = getattr(callback, "stopping_reason_message", None)  # older versions of Lightning have none
            return f"stopped early {where}: {reason or f'{callback.monitor} did not improve'}"
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None and left <= 0:
            return f"trainer.max_time is up {where}"
    return None


def objective(trainer: Trainer, model: LikelihoodModule) -> float:
    """Returns the best validation figure of the run; the last one if no checkpoint was kept; NaN if there was no validation."""
    elbo = getattr(run_checkpoint(trainer), "best_model_score", None)
    elbo = trainer.callback_metrics.get("val/elbo") if elbo is None else elbo
    if elbo is None:
        return math.nan
    if not math.isfinite(elbo):
        raise SettingError(str(diverged(f"val/elbo is {float(elbo)}", trainer.global_step)))  # without checkpoints
    return -float(elbo) if model.levels is None else nats_to_bits_per_dim(-float(elbo), model.num_dims)
