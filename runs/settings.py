"""What is refused before any training: values that the libraries below would take late, silently or with a traceback."""

from __future__ import annotations

import inspect
import math
import os
from functools import partial
from itertools import chain
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torch.distributed import is_backend_available
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from callbacks import BatchSizeFinder
from datamodules import ImageDataModule
from datamodules.sampling import at_least
from lightning_modules import LikelihoodModule
from lightning_modules.metric import TERMS
from lightning_modules.sharding import unshardable
from losses.checks import is_whole
from runs.build import SettingError, plain
from runs.devices import check_processes
from runs.directory import higher_is_better
from runs.faults import is_somebodys
from runs.kinds import wrong_kinds
from runs.names import check_names
from runs.sweep_jobs import wrong_switch

MANY_RANKS = ("MASTER_ADDR", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID")  # in the environment of those that something else starts

# least value of each, and whether null is one
INTEGERS = {
    "trainer.max_epochs": (-1, True),
    "trainer.max_steps": (-1, False),
    "trainer.check_val_every_n_epoch": (1, True),
    "trainer.log_every_n_steps": (1, True),
    "trainer.accumulate_grad_batches": (1, False),
    "trainer.num_sanity_val_steps": (-1, True),
    "trainer.num_nodes": (1, False),
    "callbacks.early_stopping.patience": (0, False),
    "callbacks.pictures.num": (1, False),
    "callbacks.pictures.every_n_epochs": (0, False),
    "callbacks.seeding.seed": (0, False),
    "model.lr_scheduler.warmup_steps": (0, False),
}
MOST = {"callbacks.pictures.num": 10_000}  # of those above, where more would take memory without end
MOST_DEVICES = 10_000  # of one machine: each is listed
# least value of each, whether that value itself is one, and whether null is
NUMBERS = {
    "trainer.gradient_clip_val": (0, True, True),
    "model.optimizer.lr": (0, False, False),
    "model.optimizer.weight_decay": (0, True, False),
}
ELSEWHERE = {  # what the trainer is given here, and the setting that decides it
    "logger": "logger=wandb, logger=csv or ~logger",
    "callbacks": "+callbacks.NAME._target_=...",
    "default_root_dir": "hydra.run.dir",
}
PRECISIONS = (
    "32-true",
    "bf16-mixed",
    "16-mixed",
    "64-true",
    "32",
    "64",
    "None",
)  # the usual ones first
BATCHES = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches")  # of trainer


def check_settings(cfg: DictConfig) -> None:
    """Refuses what cannot work.

    Raises:
        SettingError: naming the setting, its value and what to give.
    """
    check_names(cfg, "train")
    for group in ("model", "data", "trainer"):
        if not isinstance(cfg.get(group), DictConfig):
            raise SettingError(f"{group} is missing: choose one, as python train.py --help lists them")
    if not is_whole(cfg.seed, 0) or cfg.seed >= 2**32:
        unquoted = ", without quotes" if isinstance(cfg.seed, str) and cfg.seed.isdecimal() else ""
        raise SettingError(f"seed={cfg.seed}: give an integer from 0 to 4294967295{unquoted}")
    for name, instead in ELSEWHERE.items():
        if name in cfg.trainer:
            raise SettingError(f"trainer.{name}={cfg.trainer[name]}: leave it out and set {instead}")
    longest = plain(cfg.trainer).get("max_time")
    if longest is not None and not _seconds(longest) > 0:
        raise SettingError(f"trainer.max_time={longest}: give DD:HH:MM:SS, as in 00:12:00:00 for twelve hours")
    check_precision("trainer", cfg.trainer.get("precision"))
    check_devices("trainer", cfg.trainer.get("devices"))
    # the data's first, to which the model's refer; of the model, too, before data is read
    if wrong := next(chain(wrong_kinds(cfg.data), wrong_kinds(cfg)), None):
        raise SettingError(wrong)
    _check_types(cfg)
    _check_scaled_gradients(cfg)
    if "spawn" in str(cfg.trainer.get("strategy")):
        raise SettingError(
            f"trainer.strategy={cfg.trainer.strategy} would send the run to new processes, which cannot take all of it: choose "
            "trainer=ddp or trainer=ddp_cpu, whose processes begin as this one did"
        )
    _check_lengths(cfg)
    _check_monitor(cfg)
    if cfg.trainer.get("num_nodes", 1) > 1 and not any(name in os.environ for name in MANY_RANKS):
        raise SettingError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}, but nothing says where the other nodes are: start by torchrun or in a "
            "SLURM job, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on every node"
        )


def _given(cfg: DictConfig, name: str) -> Any:
    """Returns whether there is such a setting, and its value."""
    missing = object()
    value = OmegaConf.select(cfg, name, default=missing)
    return (False, None) if value is missing else (True, value)


def _check_types(cfg: DictConfig) -> None:
    for name, (least, nullable) in INTEGERS.items():
        there, value = _given(cfg, name)
        if not there or (value is None and nullable):
            continue
        try:
            at_least(name, value, least, MOST.get(name))
        except ValueError as error:
            raise SettingError(str(error)) from None
    for name, (least, itself, nullable) in NUMBERS.items():
        there, value = _given(cfg, name)
        fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        fine = fine and (value > least or (itself and value == least))
        if there and not fine and not (value is None and nullable):
            raise SettingError(f"{name}={value}: give a number {'of at least' if itself else 'above'} {least}")
    if wrong := wrong_switch(cfg):
        raise SettingError(wrong)


def check_precision(group: str, precision: Any) -> None:
    """Refuses a precision in which no bound would be worth its name.

    Args:
        group: ``trainer`` or ``fabric``, whose setting it is.
        precision: the setting.

    Raises:
        SettingError: naming it, and the usual ones.
    """
    if str(precision) not in PRECISIONS:
        raise SettingError(f"{group}.precision={precision} is not supported: choose {' or '.join(PRECISIONS[:2])}")


def check_devices(group: str, devices: Any) -> None:
    """Refuses a number of devices that no machine has, which Lightning would list one by one.

    Args:
        group: ``trainer`` or ``fabric``, whose setting it is.
        devices: the setting: a number, a list of them or a word.

    Raises:
        SettingError: naming it.
    """
    if str(devices).isdecimal() and int(devices) > MOST_DEVICES:
        raise SettingError(f"{group}.devices={devices}: give the number of devices of one machine, at most {MOST_DEVICES}")


def _check_scaled_gradients(cfg: DictConfig) -> None:
    clipped = cfg.trainer.get("gradient_clip_val") and OmegaConf.select(cfg, "model.optimizer.fused")
    if str(cfg.trainer.get("precision")) == "16-mixed" and clipped:
        raise SettingError(
            "trainer.precision=16-mixed scales gradients, which a fused optimiser takes back only after they are clipped: "
            "choose bf16-mixed, or add model.optimizer.fused=false"
        )


def _check_lengths(cfg: DictConfig) -> None:
    if all(cfg.trainer.get(name) in (None, -1) for name in ("max_steps", "max_time")) and cfg.trainer.get("max_epochs") is None:
        raise SettingError(
            "trainer.max_epochs=null says nothing of where training ends: give a number (-1: never) or trainer.max_steps"
        )
    interval = cfg.trainer.get("val_check_interval")
    if isinstance(interval, (int, float)) and not (0 < interval <= 1 if isinstance(interval, float) else interval >= 1):
        raise SettingError(
            f"trainer.val_check_interval={interval}: give a number of batches of at least 1, or a fraction up to 1.0"
        )
    for unit in ("epochs", "steps"):
        least, most = cfg.trainer.get(f"min_{unit}"), cfg.trainer.get(f"max_{unit}")
        if None not in (least, most) and 0 <= most < least:
            raise SettingError(f"trainer.min_{unit}={least} is above trainer.max_{unit}={most}: one of them has to give")
    for name in BATCHES:
        value = cfg.trainer.get(name)
        if value is None or (name in ("limit_val_batches", "overfit_batches") and value == 0):
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not (0 < value <= 1 if isinstance(value, float) else value >= 1):
            raise SettingError(f"trainer.{name}={value}: give a number of batches of at least 1, or a fraction up to 1.0")


def _seconds(duration: Any) -> float:
    """Returns how long a time is, as Lightning reads it; NaN if it is none."""
    try:
        return Timer(duration).time_remaining()
    except (MisconfigurationException, TypeError, ValueError, AttributeError):
        return math.nan


def only_tries(trainer: Trainer, cfg: DictConfig) -> bool:
    """Whether this job leaves no run: it looks for a batch size, or whether all of it works; a sweep has a place for that."""
    looks = any(isinstance(callback, BatchSizeFinder) for callback in trainer.callbacks)
    return looks or (bool(cfg.trainer.get("fast_dev_run")) and HydraConfig.get().mode != RunMode.MULTIRUN)


def chosen_callbacks(cfg: DictConfig) -> dict[str, DictConfig]:
    """Returns what conf/callbacks and the command line leave of the callbacks, by name.

    Raises:
        SettingError: if one is given a value where it has settings.
    """
    group = cfg.get("callbacks")
    if group is not None and not isinstance(group, DictConfig):
        raise SettingError(f"callbacks={group}: leave it alone, or change a setting in it, as in callbacks.NAME.SETTING=VALUE")
    chosen = {name: part for name, part in (group or {}).items() if part is not None}
    for name, part in chosen.items():
        if not isinstance(part, DictConfig):
            raise SettingError(f"callbacks.{name}={part}: ~callbacks.{name} leaves it out")
    return chosen


def _check_monitor(cfg: DictConfig) -> None:
    stop = chosen_callbacks(cfg).get("early_stopping")
    if stop is None:
        return
    if cfg.trainer.get("limit_val_batches") == 0 and not stop.get("check_on_train_epoch_end"):
        raise SettingError(
            "callbacks=early_stopping watches validations, and trainer.limit_val_batches=0 leaves none: keep some"
        )
    known = [f"val/{name}" for name in (*TERMS, "elbo_se", *(("bpd",) if cfg.data.get("levels") else ()))]
    if stop.get("check_on_train_epoch_end"):
        known += ["train/loss", "train/bpd" if cfg.data.get("levels") else "train/elbo"]
    monitor = stop.get("monitor")
    if monitor not in known:
        raise SettingError(f"callbacks.early_stopping.monitor={monitor}: choose among {', '.join(known)}")
    better = "max" if higher_is_better(monitor) else "min"
    if stop.get("mode", "min") != better:
        raise SettingError(f"callbacks.early_stopping.mode={stop.get('mode')}: {monitor} gets better with mode={better}")


def check_model(model: LikelihoodModule, image_shape: tuple[int, ...]) -> None:
    """Refuses a model of another kind or of other images, and settings of its functions that these do not have.

    Raises:
        SettingError: in one sentence.
    """
    if not isinstance(model, LikelihoodModule):
        place = f"{type(model).__module__}.{type(model).__name__}"
        raise SettingError(f"model._target_={place}: derive it from lightning_modules.LikelihoodModule, which has a bound")
    if model.image_shape != tuple(image_shape):
        raise SettingError(f"model.image_shape={list(model.image_shape)}: the data has {list(image_shape)}, leave it alone")
    for name, function in vars(model).items():
        if isinstance(function, partial):
            try:
                inspect.signature(function)
            except ValueError as error:
                if "incorrect arguments" not in str(error):  # a function that has no signature to look at
                    continue
                raise SettingError(f"model.{name}: {function.func.__name__} does not take all of {function.keywords}") from None
    try:
        model.optimizer_factory(model.parameters())
    except Exception as error:  # of whichever optimiser it is
        settings = getattr(model.optimizer_factory, "keywords", {})
        given = f" with {', '.join(f'{name}={value}' for name, value in settings.items())}" if settings else ""
        sentence = f"model.optimizer cannot be built{given}: {' '.join(str(error).split())}"
        raise SettingError(sentence) from (error if is_somebodys(error) else None)


def check_limits(cfg: DictConfig, datamodule: ImageDataModule) -> None:
    """Refuses shares of the batches and intervals that Lightning would refuse when it comes to them."""
    overfit = cfg.trainer.get("overfit_batches")
    for split in ("train", "val", "test"):
        name = "overfit_batches" if overfit and split != "test" else f"limit_{split}_batches"
        limit = cfg.trainer.get(name)
        if isinstance(limit, float) and limit:
            num = len(getattr(datamodule, f"{split}_dataloader")())
            if int(limit * num) < 1:
                raise SettingError(f"trainer.{name}={limit}: that is none of {num} {split} batches, give a number of them")
    interval, limit = cfg.trainer.get("val_check_interval"), overfit or cfg.trainer.get("limit_train_batches")
    if isinstance(interval, int) and cfg.trainer.get("check_val_every_n_epoch") is not None:
        num = len(datamodule.train_dataloader())
        num = int(limit * num) if isinstance(limit, float) else min(num, limit or num)
        if interval > num:
            raise SettingError(
                f"trainer.val_check_interval={interval}: an epoch has {num} batches; give no more, or count on through epochs "
                "by trainer.check_val_every_n_epoch=null"
            )


def check_ranks(trainer: Trainer, model: LikelihoodModule, datamodule: ImageDataModule, cfg: DictConfig) -> None:
    """Refuses what several devices cannot share, now that their number is known."""
    check_processes("trainer", trainer.num_devices, trainer.num_nodes)
    backend = getattr(trainer.strategy, "process_group_backend", None)  # what is null is chosen by device
    for name in (part.split(":")[-1] for part in (backend or "").split(",")):  # as cpu:gloo,cuda:nccl
        if name and not is_backend_available(name):
            raise SettingError(f"trainer.strategy.process_group_backend={backend}: this PyTorch has no {name}; leave it out")
    if isinstance(trainer.strategy, ModelParallelStrategy) and (wrong := unshardable(model)):
        raise SettingError(wrong)
    if trainer.world_size == 1:
        return
    for name, part in model.named_modules():
        if isinstance(part, _BatchNorm) and not isinstance(part, SyncBatchNorm):
            raise SettingError(
                f"{name} is a {type(part).__name__}, whose statistics are of one device's rows: with trainer.devices="
                f"{trainer.world_size} this would be another run than on one; choose GroupNorm or LayerNorm"
            )
    try:
        datamodule.check_ranks(trainer.world_size)
    except ValueError as error:
        raise SettingError(str(error)) from None
    for name in ("limit_val_batches", "limit_test_batches", "overfit_batches"):
        limit = cfg.trainer.get(name)
        if isinstance(limit, float) and 0 < limit < 1:
            raise SettingError(f"trainer.{name}={limit}: devices have different numbers of batches, give a number of batches")
    if any(isinstance(callback, BatchSizeFinder) for callback in trainer.callbacks):
        raise SettingError(
            f"callbacks=batch_size_finder tries one device, not trainer.devices={trainer.world_size}: run it with "
            "trainer.devices=1 and multiply what it finds by the devices"
        )
