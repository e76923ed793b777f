"""Going on: which checkpoint a job continues, whether it may, and the command that continues it."""

from __future__ import annotations

import glob
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from callbacks import all_finite
from datamodules import ImageDataModule
from runs.build import SettingError, flatten
from runs.commands import as_value, chosen, config_flags
from runs.devices import is_child_rank
from runs.directory import BEST, LAST, claim, read_checkpoint
from runs.identity import INCIDENTAL

# beside the weights, to go on, and of which kind
NEEDED = {"loops": dict, "global_step": int, "optimizer_states": list, "lr_schedulers": list, "callbacks": dict}
HOLDS = {  # what is in a part, where there is one: not all of an earlier version's checkpoints have them
    "images": set(),
    "averaging_state": {"n_averaged"},
    "totals": {"images_seen", "seconds"},
    "training_terms": {"sums", "batches", "images"},
    "begun_step": {"together", "gradients"},
    "step_profile": {"sums", "fading"},
}

OF_THE_OBJECTIVE = ("beta", "weighting", "timestep_sampler")  # may change, but not where nothing is left to train


def choose_checkpoint(
    cfg: DictConfig, config: dict[str, Any], directory: Path
) -> tuple[Path | None, int, dict[str, Any] | None]:
    """Returns the checkpoint to continue from, if any, its step and its images; refuses a directory that holds another run."""
    checkpoint, step, images = None, 0, None
    if cfg.ckpt == "auto":  # a job that is killed during its first validation leaves the best alone
        checkpoint = next((directory / name for name in (LAST, BEST) if (directory / name).is_file()), None)
    elif cfg.ckpt is not None:
        named = any(item.startswith("hydra.run.dir=") for item in HydraConfig.get().overrides.hydra)
        others = None if named else f"{glob.escape(cfg.paths.output_dir)}/*/*-{chosen(cfg, 'model')}-{chosen(cfg, 'data')}"
        checkpoint = find_checkpoint(str(cfg.ckpt), directory, others)
    if checkpoint is not None:
        held = read_checkpoint(checkpoint, "ckpt")
        complete(held, checkpoint)
        same_model(held["config"], config, checkpoint)
        same_data(held["config"], config, checkpoint)
        same_optimizer(held["config"], config, checkpoint)
        enough_training(trained(held), cfg.trainer, checkpoint)
        something_left(trained(held), cfg.trainer, held["config"], config, checkpoint)
        same_batches(held, config, checkpoint)
        check_best(directory / BEST, checkpoint)
        step, images = held["global_step"], held.get("images")
        if not all_finite(value for value in held["state_dict"].values() if isinstance(value, torch.Tensor)):
            raise SettingError(
                f"ckpt={checkpoint} holds weights that are not finite: give an earlier one, or start without ckpt"
            )
    if not is_child_rank():
        own = checkpoint is not None and directory in checkpoint.absolute().parents
        in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN  # whose directories are named by what their jobs are
        if not own and not in_sweep:
            claim(directory, again=cfg.ckpt == "auto")
    return checkpoint, step, images


def check_best(best: Path, checkpoint: Path) -> None:
    """Refuses a damaged best.ckpt in the run's directory: what is tested at the end is read only then.

    Raises:
        SettingError: saying how to go on without it.
    """
    if best.is_file() and not (checkpoint.exists() and best.samefile(checkpoint)):
        try:
            read_checkpoint(best, "ckpt")
        except SettingError:
            raise SettingError(
                f"{best} is damaged, and the run would be tested by it: move it away, and the best is sought anew from here on"
            ) from None


def complete(held: dict[str, Any], path: Path) -> None:
    """Refuses a checkpoint without what training goes on from, or with something else in its place.

    Raises:
        SettingError: naming the first part that is missing or of another kind.
    """
    if missing := [name for name in NEEDED if name not in held]:
        raise SettingError(f"ckpt={path} has no {missing[0]}, so training cannot go on from it: give last.ckpt of a run")
    wrong = [name for name, kind in NEEDED.items() if not isinstance(held[name], kind)]
    wrong += [name for name in ("loops", "optimizer_states") if not held[name]]
    averaged = {"averaging_state"} if "current_model_state" in held else set()
    parts = {name: held.get(name) for name in HOLDS if name in held.keys() | averaged}
    wrong += [name for name, part in parts.items() if not (isinstance(part, dict) and HOLDS[name] <= part.keys())]
    if wrong:
        raise SettingError(f"ckpt={path} is damaged, as its {wrong[0]} shows: give another checkpoint")


def find_checkpoint(ckpt: str, directory: Path, others: str | None) -> Path:
    """Returns the checkpoint that ``ckpt`` means.

    Args:
        ckpt: ``last``, a checkpoint file, or a run directory.
        directory: this run's directory; its own last checkpoint comes first.
        others: a pattern of run directories of this model and data, the newest of which comes next with ``last``; ``None``
            where the run's directory was named, since another would not be what was meant.

    Raises:
        SettingError: if there is none.
    """
    if ckpt != "last":
        path = Path(ckpt)
        path = path / LAST if path.is_dir() else path
        if not path.is_file():
            raise SettingError(f"ckpt={ckpt} is not a checkpoint file or a run directory with {LAST}: give one, or ckpt=last")
        return path
    if (directory / LAST).is_file():
        return directory / LAST
    if others is None:
        raise SettingError(
            f"hydra.run.dir={directory} ckpt=last: there is no {LAST} in it; look at the name, leave ckpt out to begin, or "
            "give ckpt=DIR to go on from another run"
        )
    if found := [*glob.glob(f"{others}/{LAST}"), *glob.glob(f"{others}-[0-9]*/{LAST}")]:
        return Path(max(found, key=lambda path: Path(path).stat().st_mtime))
    raise SettingError(f"ckpt=last found no {LAST} in {directory} nor in {others}: train first, or give a path")


def differences(theirs: dict[str, Any], ours: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted key, value there, value here) of every setting that differs; ``None`` is one that is left out."""
    there, here = dict(flatten(theirs, prefix)), dict(flatten(ours, prefix))
    for key in here | there:
        if there.get(key) != here.get(key):
            yield key, there.get(key), here.get(key)


def same_model(theirs: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    """Refuses to continue a checkpoint of another model: weights that fit by accident would train on the wrong bound.

    Optimiser, learning rate, evaluation effort and what is kept in memory may change.

    Raises:
        SettingError: naming the first setting that differs.
    """
    free = {"optimizer", "lr_scheduler", "val_calls", "test_calls", *OF_THE_OBJECTIVE, "sampler"}
    models = (
        # what kind it is first
        {"_target_": model["_target_"], **{name: value for name, value in model.items() if name not in free}}
        for model in (theirs["model"], ours["model"])
    )
    for key, there, here in differences(*models, "model"):
        if not key.endswith(".checkpoint_activations"):
            raise SettingError(
                f"ckpt={path} holds another model: there {key}={there}, here {key}={here}; use that run's settings"
            )


def same_data(theirs: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    """Refuses other images, or the same ones split otherwise: a test set that was trained on proves nothing.

    Where they lie, how they are read and how many make a batch may change.

    Raises:
        SettingError: naming the first setting that differs.
    """
    free = {f"data.{name}" for name in ("batch_size", "seed", "block_size", "horizontal_flip", "flip")} | set(INCIDENTAL)
    known = dict(flatten(theirs["data"], "data"))
    for key, there, here in differences(theirs["data"], ours["data"], "data"):
        if key not in free and key in known:  # what an earlier version did not have yet is no difference
            raise SettingError(f"ckpt={path} was trained on other data: there {key}={there}, here {key}={here}")


def same_images(theirs: dict[str, Any] | None, datamodule: ImageDataModule, what: str) -> None:
    """Refuses other images under the same settings, as where files were added to a folder, which deals its splits anew.

    Args:
        theirs: what the checkpoint says of its images; ``None`` if it is an earlier version's.
        datamodule: with its data read.
        what: the setting that names the checkpoint, and its value.

    Raises:
        SettingError: naming what differs.
    """
    for name, here in datamodule.fingerprint().items():
        if theirs is not None and name in theirs and theirs[name] != here:
            raise SettingError(
                f"{what} was trained on other images: there {name}={theirs[name]}, here {here}; give the images as they were"
            )


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


def trained(checkpoint: dict[str, Any]) -> dict[str, int]:
    """Returns {max_epochs, max_steps}: as many as a checkpoint has behind it."""
    fit = checkpoint["loops"]["fit_loop"]
    epochs = fit["epoch_progress"]["current"]
    # written in the validation after an epoch, which then does not count as processed yet
    ended = fit["epoch_loop.batch_progress"]["is_last_batch"] and epochs["ready"] > epochs["processed"]
    return {"max_epochs": epochs["processed"] + ended, "max_steps": checkpoint["global_step"]}


def enough_training(done: dict[str, int], trainer: DictConfig, path: Path) -> None:
    """Refuses to train for less than there has been.

    Raises:
        SettingError: naming both.
    """
    for name, count in done.items():
        limit = trainer.get(name)
        if limit is not None and 0 <= limit < count:
            unit = name.removeprefix("max_")
            raise SettingError(f"trainer.{name}={limit}: ckpt={path} has trained {count} {unit}: give as many, or more")


def something_left(done: dict[str, int], trainer: DictConfig, theirs: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    """Refuses another objective where nothing is left to train: the figures would stand under settings that they do not follow.

    Raises:
        SettingError: naming the first setting that differs.
    """
    if all(trainer.get(name) != count for name, count in done.items()):
        return
    objectives = ({name: config["model"].get(name) for name in OF_THE_OBJECTIVE} for config in (theirs, ours))
    for key, there, here in differences(*objectives, "model"):
        raise SettingError(
            f"{key}={here}: ckpt={path} was trained with {there}, and nothing is left to train: give more "
            "trainer.max_epochs or trainer.max_steps, or leave it alone"
        )


def same_batches(checkpoint: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    """Refuses what deals batches otherwise where the epoch is to go on after its n-th, which would then be another place.

    Raises:
        SettingError: naming the setting and both values.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    if not progress["current"]["processed"] or progress["is_last_batch"]:
        return
    for name in ("batch_size", "seed", "block_size"):
        there, here = (config["data"].get(name) for config in (checkpoint["config"], ours))
        if there != here:
            raise SettingError(
                f"ckpt={path} stopped in the middle of an epoch that is dealt by data.{name}={there}: go on with "
                f"data.{name}={there}, not {here}, or from a checkpoint of the end of an epoch"
            )


def resume_command(directory: Path) -> str:
    """Returns the command that continues this job in its own directory."""
    overrides = [item for item in HydraConfig.get().overrides.task if not item.startswith("ckpt=")]
    place = f"hydra.run.dir={as_value(str(directory))}"
    return shlex.join(["python", sys.argv[0], *config_flags(), *overrides, place, "ckpt=last"])
