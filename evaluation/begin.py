"""How a job on a saved run begins: its settings are looked at, the run is opened, and its model put on a device."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric import Fabric
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console

from datamodules.sampling import at_least
from evaluation.saved import SavedRun
from lightning_modules import LikelihoodModule
from losses.checks import is_whole
from runs.build import SettingError, build_part
from runs.devices import check_processes, round_float32
from runs.settings import MANY_RANKS, check_devices, check_precision


def check_kinds(
    cfg: DictConfig,
    least: Mapping[str, int],
    switches: Sequence[str],
    optional: Sequence[str] = (),
    most: Mapping[str, int] | None = None,
) -> None:
    """Refuses settings of another kind, in one sentence.

    Args:
        cfg: the job's config.
        least: integers, with the least that each may be.
        switches: those that are true or false.
        optional: integers that may be null.
        most: the most that some of the integers may be.
    """
    for name in switches:
        if not isinstance(cfg[name], bool):
            raise SettingError(f"{name}={cfg[name]}: give true or false")
    for name, minimum in least.items():
        if cfg[name] is None and name in optional:
            continue
        try:
            at_least(name, cfg[name], minimum, (most or {}).get(name))
        except ValueError as error:
            raise SettingError(str(error)) from None


def check_groups(cfg: DictConfig, *names: str) -> None:
    """Refuses a single value where a group's settings belong."""
    for name in names:
        if not isinstance(cfg.get(name), DictConfig):
            raise SettingError(f"{name}={cfg.get(name)}: leave it alone, or change a setting in it, as in {name}.NAME=VALUE")


def open_run(cfg: DictConfig) -> SavedRun:
    """Opens what ``run`` names, with objects of ``packages`` allowed.

    Raises:
        SettingError: if nothing is named, or what is named is no run that could take results.
    """
    if OmegaConf.is_missing(cfg, "run"):
        raise SettingError(
            "run= is missing: give a run directory or a checkpoint file, as in run=outputs/2026-01-31/12-00-00-ddpm-digits"
        )
    given = cfg.packages
    names = list(given) if isinstance(given, ListConfig) else [] if given is None else [given]  # packages=mine is one of them
    if not all(isinstance(name, str) and name for name in names):
        raise SettingError(f"packages={given}: give names of packages, as in packages=[my_networks]")
    saved = SavedRun.open(str(cfg.run), names)
    directory = saved.directory
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise SettingError(f"run: results would go to {directory}, where nothing can be written: copy the run elsewhere")
    return saved


def build_fabric(cfg: DictConfig, adds_up: bool) -> Fabric:
    """Builds Fabric; devices and precisions that do not exist here are refused in one sentence.

    Args:
        cfg: conf/fabric.
        adds_up: whether figures are added up, which takes float64.
    """
    if not is_whole(cfg.num_nodes, 1):
        raise SettingError(f"fabric.num_nodes={cfg.num_nodes}: give an integer of at least 1")
    if cfg.num_nodes > 1 and not any(name in os.environ for name in MANY_RANKS):
        raise SettingError(
            f"fabric.num_nodes={cfg.num_nodes}, but nothing says where the others are: start by torchrun or in SLURM"
        )
    check_precision("fabric", cfg.precision)
    check_devices("fabric", cfg.devices)
    settings = OmegaConf.to_container(cfg, resolve=True)
    if adds_up and settings["accelerator"] == "auto" and torch.backends.mps.is_available():
        settings["accelerator"] = "cpu"  # Apple's GPUs have no float64
    round_float32("fabric", settings.pop("float32_matmul_precision"))
    fabric: Fabric = build_part(OmegaConf.create({"fabric": {"_target_": "lightning.fabric.Fabric", **settings}}).fabric)
    check_processes("fabric", len(getattr(fabric.strategy, "parallel_devices", None) or [fabric.device]), cfg.num_nodes)
    return fabric


def place(model: LikelihoodModule, fabric: Fabric, cfg: DictConfig) -> LikelihoodModule:
    """Returns the model on Fabric's device, in the precision of conf/fabric, for evaluation."""
    wide = str(cfg.precision).startswith("64")  # which Fabric would give to modules that it wraps
    return model.to(fabric.device, torch.float64 if wide else None).eval()


def say(fabric: Fabric, text: Any) -> None:
    """Prints on rank 0."""
    if fabric.is_global_zero:
        Console().print(text, markup=False, highlight=False, soft_wrap=isinstance(text, str))
