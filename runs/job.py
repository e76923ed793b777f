"""One training job: compose -> seed -> data -> model -> loggers -> trainer -> fit -> test -> result.json and a table."""

from __future__ import annotations

import inspect
import logging
import math
import re
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, LambdaCallback, Timer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from callbacks import (
    EMA,
    BatchSizeFinder,
    LastValidation,
    Pictures,
    RunCheckpoint,
    StopsAfterBatch,
    WholeSteps,
    diverged,
    out_of_patience,
    run_checkpoint,
    tested_step,
)
from datamodules import ImageDataModule
from lightning_modules import LikelihoodModule
from loggers import MetricsCSV, finish_wandb, wandb_logger
from losses.elbo import nats_to_bits_per_dim
from runs.build import RankError, SettingError, build_part, factory, plain
from runs.devices import compile_networks, is_child_rank
from runs.directory import CONFIG, FORMAT, LAST, LOCK, RESULT, hold, withdraw_result, write_json
from runs.entry import refusal
from runs.faults import is_fault, is_somebodys
from runs.kinds import unknown
from runs.report import code_version, facts_to_group_by, result_record, table, totals
from runs.resuming import choose_checkpoint, resume_command, same_images
from runs.settings import check_limits, check_model, check_ranks, check_settings, chosen_callbacks

LOST = ("closed by peer", "Connection reset", "Broken pipe", "Connection refused")  # how gloo says that a rank has gone


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
    with nullcontext() if is_child_rank() else hold(directory):
        return run_in(directory, cfg)


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
        check_ranks(trainer, datamodule, cfg)
        # only now: what was refused is no run, not in W&B either, and may be tried again; nor is what only tries something out
        first = describe(cfg, model, datamodule)
        if not only_tries(trainer, cfg):
            first += f"\nrun directory: {directory}"
            if not trainer.fast_dev_run:
                trainer.loggers = build_loggers(cfg, config, directory, step)
            if not is_child_rank():
                OmegaConf.save(OmegaConf.create(config), directory / CONFIG)
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
        finish_wandb(failed)
        in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN  # which keeps of each job how it ended
        if fresh and not in_sweep and not is_child_rank() and trainer is not None and only_tries(trainer, cfg):
            shutil.rmtree(directory, ignore_errors=True)


def quiet_libraries() -> None:
    """Leaves of libraries' lines the warnings, once each: what a run does is said here, in fewer words."""
    lightning = logging.getLogger("lightning")
    lightning.handlers.clear()  # Hydra's root handler prints them already
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # a name that is nowhere is said in one sentence
    for message in (
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        ".*smaller than the logging interval.*",
        ".*exists and is not empty.*",
        ".*FSDP2-wrapped module.*returned a view tensor.*",  # nothing writes to what a network returns
        ".*have overridden `on_before_batch_transfer` in `LightningModule`.*",  # the data modules here have none
        ".*It is recommended to use `self.log.*sync_dist=True.*",  # the metric has reduced over ranks already
    ):
        warnings.filterwarnings("ignore", message)


@rank_zero_only
def say(trainer: Trainer, text: str) -> None:
    """Prints once, on rank 0."""
    print(text, flush=True)


def describe(cfg: DictConfig, model: LikelihoodModule, datamodule: ImageDataModule) -> str:
    """Returns the line a run starts with: what is trained on what."""
    choices = HydraConfig.get().runtime.choices
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"model={choices.model} ({parameters:,} parameters)  data={datamodule.describe()}  seed={cfg.seed}"


def load_data(cfg: DictConfig) -> ImageDataModule:
    """Builds the data module and reads the data now: what is missing is said before anything else is built.

    By any rank: the first may have found what another node has not.
    """
    datamodule = build_part(cfg)
    if not isinstance(datamodule, ImageDataModule):
        raise SettingError(
            f"data._target_={cfg._target_}: derive it from datamodules.ImageDataModule, whose load() gives images"
        )
    try:
        if not is_child_rank():
            datamodule.prepare_data()
        datamodule.setup()
        datamodule.train_dataloader()  # refuses a batch larger than the data here, not in the middle of fit
    except (ValueError, OSError) as error:
        raise (RankError if is_child_rank() else SettingError)(" ".join(str(error).split())) from error
    return datamodule


def only_tries(trainer: Trainer, cfg: DictConfig) -> bool:
    """Whether this job leaves no run: it looks for a batch size, or whether all of it works; a sweep has a place for that."""
    looks = any(isinstance(callback, BatchSizeFinder) for callback in trainer.callbacks)
    return looks or (bool(cfg.trainer.get("fast_dev_run")) and HydraConfig.get().mode != RunMode.MULTIRUN)


def build_trainer(cfg: DictConfig, config: dict[str, Any], directory: Path) -> Trainer:
    """Builds callbacks and the trainer; devices and precision that do not exist here are refused in one sentence."""
    callbacks = build_callbacks(cfg, config, directory)
    try:
        return factory(cfg.trainer)(callbacks=callbacks, logger=False, default_root_dir=str(directory))
    except (MisconfigurationException, ImportError, TypeError, ValueError, RuntimeError) as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found and found[1] in cfg.trainer:
            raise SettingError(unknown(cfg.trainer, found[1], inspect.signature(Trainer).parameters)) from None
        setting = f".devices={cfg.trainer.devices}" if "devices" in str(error) else ""
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
            raise SettingError(f"logger: {' '.join(str(error).split())}") from error
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
        if isinstance(callback, Timer) and (callback.time_remaining() or 1) < 0:
            return f"trainer.max_time is up {where}"
    return None


@contextmanager
def one_sentence(trainer: Trainer) -> Iterator[None]:
    """Turns what data, a setting or another rank can do to a run into one sentence.

    Raises:
        SettingError: where every rank raises it, as one that a callback saw training diverge by.
        RankError: where it may have been this rank alone.
        Exception: as it was, for a fault of code of a kind that no refusal is.
    """
    try:
        yield
    except (FloatingPointError, MisconfigurationException) as error:
        raise SettingError(" ".join(str(error).split())) from error
    except ValueError as error:
        raise RankError(" ".join(str(error).split())) from error
    except OSError as error:
        raise RankError(refusal(error)) from error
    except Exception as error:
        if "loading state_dict" in str(error):
            raise SettingError(f"ckpt= has other weights than this model: {' '.join(str(error).split())[:300]}") from None
        if trainer.world_size > 1 and any(sign in str(error) for sign in LOST):
            raise RankError(f"rank {trainer.global_rank} has lost another one, which ended before it") from None
        if is_fault(error) or is_somebodys(error):
            raise
        raise SettingError(" ".join(str(error).split())) from error  # Lightning's look at what a callback was given


def objective(trainer: Trainer, model: LikelihoodModule) -> float:
    """Returns the best validation figure of the run; the last one if no checkpoint was kept; NaN if there was no validation."""
    elbo = getattr(run_checkpoint(trainer), "best_model_score", None)
    elbo = trainer.callback_metrics.get("val/elbo") if elbo is None else elbo
    if elbo is None:
        return math.nan
    if not math.isfinite(elbo):
        raise SettingError(str(diverged(f"val/elbo is {float(elbo)}", trainer.global_step)))  # without checkpoints
    return -float(elbo) if model.levels is None else nats_to_bits_per_dim(-float(elbo), model.num_dims)


def test(
    trainer: Trainer,
    model: LikelihoodModule,
    datamodule: ImageDataModule,
    directory: Path,
    cfg: DictConfig,
    started: float,
    best_figure: float,
) -> None:
    """Tests the best weights, or the last if none were validated: result.json, the table, and after these the pictures."""
    session, step = time.monotonic() - started, trainer.global_step
    best = getattr(run_checkpoint(trainer), "best_model_path", "") or None
    trainer.fit_loop.epoch_loop._batches_that_stepped = step  # which numbers the row of the test; one less after a resumed run
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
        "objective": best_figure,
    }
    pictures = [callback for callback in trainer.callbacks if isinstance(callback, Pictures)]

    def report(trainer: Trainer, model: LikelihoodModule) -> None:
        if only_tries(trainer, cfg):
            text = f"trainer.fast_dev_run={cfg.trainer.fast_dev_run}: training, validation and test work; there is no result"
            say(trainer, text)
        elif trainer.is_global_zero:
            write_result(trainer, model, directory, facts, session, time.monotonic() - started)
            if pictures:
                say(trainer, f"drawing pictures of samples and of each KL, in {directory}")
                end_by_sigterm()

    others = [callback for callback in trainer.callbacks if callback not in pictures]
    trainer.callbacks = [*others, LambdaCallback(on_test_end=report), *pictures]
    try:
        with one_sentence(trainer):
            trainer.test(model, datamodule, ckpt_path=best, verbose=False, weights_only=True)
    except (KeyboardInterrupt, SystemExit, SIGTERMException):
        if (directory / RESULT).is_file():
            say(trainer, "\ninterrupted while pictures were drawn; the result stands")
        elif (directory / LAST).is_file():
            say(trainer, f"\ninterrupted in the test; to begin it again:\n  {resume_command(directory)}")
        raise


def write_result(
    trainer: Trainer, model: LikelihoodModule, directory: Path, facts: dict[str, Any], fitted: float, elapsed: float
) -> None:
    """Writes result.json and prints the table: figures come before pictures, which take their time.

    Args:
        trainer: the run's, as its test ends.
        model: with the tested weights.
        directory: the run's.
        facts: what stands beside the figures.
        fitted: seconds of this session when fit was over.
        elapsed: seconds of this session.
    """
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
    step, tested = facts["step"], tested_step(trainer)
    protocol = {**facts["protocol"], "num_tested": model.num_scored}
    facts = {**facts, "protocol": protocol, "tested_step": tested, **totals(trainer, fitted, elapsed)}
    write_json(directory / RESULT, result_record(metrics, model.num_dims, model.levels, **facts))
    steps = f"step {tested}" + (f" of {step}, the best in validation" if tested < step else "")
    whole = model.num_scored == protocol["num_test"]  # else trainer.limit_test_batches left some out
    images = "test set" if whole else f"{model.num_scored} of {protocol['num_test']} test images"
    Console().print(table(metrics, model.num_dims, model.levels, f"{images}, {facts['weights']} weights, {steps}"))


def end_by_sigterm() -> None:
    """Has SIGTERM end what follows at once: Lightning looks for it between batches, and there are none any more."""

    def end(*_: Any) -> None:
        raise SIGTERMException

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)  # Lightning puts back what was there before
