"""One evaluation: load a saved run -> estimate the bound -> what else was asked -> evaluation.json and a table."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from callbacks import all_finite
from evaluation.estimate import estimate_bound
from evaluation.estimators import Estimator
from evaluation.extras import extra_lines, extras
from evaluation.report import bound_record, bound_table, evaluation_record, write_new
from evaluation.saved import SavedRun
from evaluation.setting import Setting, SplitImages
from lightning_modules import DDPMLightningModule, LikelihoodModule
from runs.build import SettingError, build_part
from runs.devices import round_float32
from runs.job import quiet_libraries
from runs.settings import MANY_RANKS


def run(cfg: DictConfig) -> tuple[float, bool]:
    """Evaluates what ``cfg`` describes.

    Returns:
        (bits/dim, or -ELBO in nats for continuous data, of the first set of weights; whether Ctrl-C cut it short).

    Raises:
        SettingError: for a setting that cannot work, before anything is evaluated.
    """
    started = time.monotonic()
    quiet_libraries()
    check_settings(cfg)
    saved = SavedRun.open(str(cfg.run), packages_of(cfg.packages))
    check_place(saved.directory)
    chosen = choose_weights(cfg.weights, saved)
    check_weights(saved, chosen)
    estimator = build_part(cfg.evaluation)
    model = saved.model()
    check_model(cfg, estimator, model)
    datamodule = saved.data(cfg.data_root)
    saved.load(model, chosen[0])
    fabric = build_fabric(cfg.fabric)
    fabric.launch()
    model = model.to(fabric.device, torch.float64 if str(cfg.fabric.precision).startswith("64") else None).eval()
    results, pictures, interrupted = {}, {}, False
    for weights in chosen:
        saved.load(model, weights)
        setting = Setting(cfg, model, SplitImages.of(datamodule, cfg.split), fabric)
        try:
            bound = estimate_bound(setting, estimator)
        except KeyboardInterrupt:
            raise SettingError("interrupted before the evaluation proper had begun: nothing to report") from None
        interrupted = bound.interrupted
        results[weights] = bound_record(bound, model)
        say(fabric, bound_table(bound, model, f"{cfg.split} set, {weights} weights, step {saved.content.get('global_step')}"))
        if interrupted:
            break
        extra: dict[str, Any] = {}
        try:
            drawn = extras(setting, bound, extra)
            pictures |= drawn if weights == chosen[0] else {}
        except KeyboardInterrupt:
            interrupted = True
        results[weights] |= extra
        for line in extra_lines(extra, model):
            say(fabric, line)
        if interrupted:
            say(fabric, "interrupted: the rest of what was asked for is left out")
            break
    if fabric.is_global_zero:
        record = evaluation_record(cfg, saved, datamodule, results, fabric, interrupted, time.monotonic() - started)
        path = write_new(saved.directory, record, pictures)
        say(
            fabric,
            f"wrote {path}" + (f" and {len(pictures)} pictures in {path.parent / 'plots' / 'evaluation'}" if pictures else ""),
        )
    first = results[chosen[0]]
    return first.get("bpd", first["terms"]["elbo"]["nats"]["mean"]), interrupted


def packages_of(given: Any) -> list[str]:
    """Returns the names of packages: ``packages=mine`` is one of them."""
    names = list(given) if isinstance(given, ListConfig) else [] if given is None else [given]
    if not all(isinstance(name, str) and name for name in names):
        raise SettingError(f"packages={given}: give names of packages, as in packages=[my_networks]")
    return names


def say(fabric: Fabric, text: Any) -> None:
    """Prints on rank 0."""
    if fabric.is_global_zero:
        Console().print(text, markup=False, highlight=False, soft_wrap=isinstance(text, str))


def check_settings(cfg: DictConfig) -> None:
    """Refuses what cannot work, in one sentence."""
    if OmegaConf.is_missing(cfg, "run"):
        raise SettingError(
            "run= is missing: give a run directory or a checkpoint file, as in run=outputs/2026-01-31/12-00-00-ddpm-digits"
        )
    for group in ("evaluation", "fabric"):
        if not isinstance(cfg.get(group), DictConfig):
            raise SettingError(f"{group}={cfg.get(group)}: leave it alone, or change a setting in it, as in {group}.NAME=VALUE")
    if cfg.split not in ("train", "val", "test"):
        raise SettingError(f"split={cfg.split} is unknown: choose train, val or test")
    if isinstance(cfg.precision, bool) or not isinstance(cfg.precision, (int, float)) or not cfg.precision > 0:
        raise SettingError(
            f"precision={cfg.precision} must be above 0: it is the wished standard error of the noise, in bits/dim"
        )
    least = {"batch_size": 1, "iwae_samples": 0, "probability_flow": 0, "seed": 0, "replicates": 1, "max_images": 2}
    for name in ("balance", "pictures"):
        if not isinstance(cfg[name], bool):
            raise SettingError(f"{name}={cfg[name]}: give true or false")
    if cfg.fabric.num_nodes > 1 and not any(name in os.environ for name in MANY_RANKS):
        raise SettingError(
            f"fabric.num_nodes={cfg.fabric.num_nodes}, but nothing says where the others are: start by torchrun or in SLURM"
        )
    for name, minimum in least.items():
        value = cfg[name]
        if value is None and name in ("replicates", "max_images"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise SettingError(f"{name}={value}: give an integer of at least {minimum}")


def check_place(directory: Path) -> None:
    """Refuses to evaluate what has no place for its results."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise SettingError(f"run: results would go to {directory}, where nothing can be written: copy the run elsewhere")


def check_model(cfg: DictConfig, estimator: Estimator, model: LikelihoodModule) -> None:
    """Refuses what this family of models does not have."""
    try:
        estimator.check(model)
    except ValueError as error:
        raise SettingError(str(error)) from None
    if cfg.probability_flow and not isinstance(model, DDPMLightningModule):
        raise SettingError(f"probability_flow={cfg.probability_flow} is for DDPM, but this run is a {type(model).__name__}")


def choose_weights(wished: str | None, saved: SavedRun) -> list[str]:
    """Returns the sets of weights to evaluate: by default what the run itself was tested with."""
    there = list(saved.weights)
    if wished == "both" and len(there) == 2:
        return there
    if wished not in (None, *there):
        raise SettingError(f"weights={wished}: this checkpoint has {' and '.join(there)} weights; choose one of them or both")
    return [wished or there[0]]


def check_weights(saved: SavedRun, chosen: list[str]) -> None:
    """Refuses weights that are not finite."""
    for name in chosen:
        if not all_finite(value for value in saved.weights[name].values() if isinstance(value, Tensor)):
            raise SettingError(f"run={saved.path} holds {name} weights that are not finite: give another checkpoint")


def build_fabric(cfg: DictConfig) -> Fabric:
    """Builds Fabric; devices and precisions that do not exist here are refused in one sentence."""
    if "true" in str(cfg.precision) and not str(cfg.precision).startswith(("32", "64")):
        raise SettingError(f"fabric.precision={cfg.precision} is not supported: choose bf16-mixed or 32-true")
    settings = OmegaConf.to_container(cfg, resolve=True)
    if settings["accelerator"] == "auto" and torch.backends.mps.is_available():
        settings["accelerator"] = "cpu"  # Apple's GPUs have no float64, in which an evaluation adds up
    round_float32("fabric", settings.pop("float32_matmul_precision"))
    try:
        return Fabric(**settings)
    except Exception as error:
        raise SettingError(f"fabric: {' '.join(str(error).split())}") from error
