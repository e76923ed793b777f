"""Going on: which checkpoint a job continues, whether it may, and the command that continues it."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from callbacks import all_finite
from runs.build import SettingError
from runs.devices import is_child_rank
from runs.directory import LAST, claim, read_checkpoint

NEEDED = ("loops", "global_step", "optimizer_states", "lr_schedulers")  # beside the weights, to go on


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
        if missing := [name for name in NEEDED if name not in held]:
            raise SettingError(
                f"ckpt={checkpoint} has no {missing[0]}, so training cannot go on from it: give last.ckpt of a run"
            )
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


def find_checkpoint(ckpt: str, directory: Path, outputs: Path, suffix: str) -> Path:
    """Returns the checkpoint that ``ckpt`` means.

    Args:
        ckpt: ``last``, a checkpoint file, or a run directory.
        directory: this run's directory; its own last checkpoint comes first.
        outputs: where run directories lie; with ``last``, the newest one of this model and data comes next.
        suffix: how run directories of this model and data end.

    Raises:
        SettingError: if there is none.
    """
    if ckpt != "last":
        path = Path(ckpt)
        path = path / LAST if path.is_dir() else path
        if not path.is_file():
            raise SettingError(f"ckpt={ckpt} is not a checkpoint file or a run directory with {LAST}: give one, or ckpt=last")
        return path
    candidates = sorted(outputs.glob(f"*/*{suffix}/{LAST}"), key=lambda path: path.stat().st_mtime)
    for path in (directory / LAST, *reversed(candidates)):
        if path.is_file():
            return path
    raise SettingError(f"ckpt=last found no {LAST} in {directory} nor in {outputs}/*/*{suffix}: train first, or give a path")


def same_model(theirs: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    """Refuses to continue a checkpoint of another model: weights that fit by accident would train on the wrong bound.

    Optimiser, learning rate, evaluation effort and what is kept in memory may change.

    Raises:
        SettingError: naming the first setting that differs.
    """
    free = {"optimizer", "lr_scheduler", "val_calls", "test_calls", "beta", "weighting", "timestep_sampler", "sampler"}
    parts = {name: value for name, value in ours["model"].items() if name not in free}
    for key, here in flatten({"_target_": ours["model"]["_target_"], **parts}, "model"):  # what kind it is first
        there = dict(flatten(theirs["model"], "model")).get(key)
        if there != here and not key.endswith(".checkpoint_activations"):
            raise SettingError(
                f"ckpt={path} holds another model: there {key}={there}, here {key}={here}; use that run's settings"
            )


def same_data(theirs: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    """Refuses other images, or the same ones split otherwise: a test set that was trained on proves nothing.

    Where they lie, how they are read and how many make a batch may change.

    Raises:
        SettingError: naming the first setting that differs.
    """
    free = {"root", "download", "batch_size", "seed", "num_workers", "prefetch", "verify", "max_memory_gb", "block_size"}
    there = dict(flatten(theirs["data"], "data"))
    for key, here in flatten({k: v for k, v in ours["data"].items() if k not in free | {"horizontal_flip", "flip"}}, "data"):
        if key in there and there[key] != here:  # what an earlier version did not have yet is no difference
            raise SettingError(f"ckpt={path} was trained on other data: there {key}={there[key]}, here {key}={here}")


def same_optimizer(theirs: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    """Refuses another kind of optimiser, which cannot go on with the state of this one; its settings may change.

    Raises:
        SettingError: naming both.
    """
    there, here = ((config["model"].get("optimizer") or {}).get("_target_", "torch.optim.AdamW") for config in (theirs, ours))
    if there != here:
        raise SettingError(
            f"ckpt={path} was trained by {there}, here {here}, which has another state: keep model.optimizer._target_={there}"
        )


def enough_epochs(checkpoint: dict[str, Any], max_epochs: int | None, path: Path) -> None:
    """Refuses to train for fewer epochs than there have been.

    Raises:
        SettingError: naming both.
    """
    fit = checkpoint["loops"]["fit_loop"]
    epochs = fit["epoch_progress"]["current"]
    # written in the validation behind an epoch, which then does not count as processed yet
    done = epochs["processed"] + (fit["epoch_loop.batch_progress"]["is_last_batch"] and epochs["ready"] > epochs["processed"])
    if max_epochs is not None and 0 <= max_epochs < done:
        raise SettingError(f"trainer.max_epochs={max_epochs}: ckpt={path} has trained {done} epochs: give as many, or more")


def same_batches(checkpoint: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    """Refuses another batch size where the epoch is to go on behind its n-th batch, which would then be another place.

    Raises:
        SettingError: naming both sizes.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    there, here = (config["data"].get("batch_size") for config in (checkpoint["config"], ours))
    if there != here and progress["current"]["processed"] and not progress["is_last_batch"]:
        raise SettingError(
            f"ckpt={path} stopped amid an epoch of batches of {there}: go on with data.batch_size={there}, not {here}, or from "
            "a checkpoint of the end of an epoch"
        )


def flatten(value: Any, prefix: str) -> list[tuple[str, Any]]:
    """Returns (dotted key, value) for every leaf of nested dicts; lists count as leaves."""
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [leaf for key, child in value.items() for leaf in flatten(child, f"{prefix}.{key}")]


def resume_command(directory: Path) -> str:
    """Returns the command that continues this job in its own directory."""
    overrides = [item for item in HydraConfig.get().overrides.task if not item.startswith("ckpt=")]
    place = str(directory)
    if not re.fullmatch(r"[\w ./-]+", place, re.ASCII):  # Hydra has a grammar of its own
        place = "'" + place.replace("'", r"\'") + "'"
    return shlex.join(["python", sys.argv[0], *overrides, f"hydra.run.dir={place}", "ckpt=last"])
