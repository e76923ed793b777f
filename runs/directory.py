"""Run directories: claiming a new one, and finding the checkpoint to go on from."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runs.build import SettingError

CONFIG, RESULT, LAST, BEST = "config.yaml", "result.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt"
LOCK, WAIT = ".lock", 10.0  # seconds: the workers of a killed job notice after five, and keep what it held until then
FORMAT = 1  # of checkpoints: raised when what they hold changes its meaning


class HeldElsewhere(SettingError):
    """Another process is running the job of this directory."""


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Keeps a run directory for this process, for the block; the system lets go of it however the process ends.

    Raises:
        HeldElsewhere: if another process keeps it still after ``WAIT``.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(directory / LOCK, timeout=WAIT, is_singleton=True)  # a sweep's job is a run, which asks again
    try:
        lock.acquire()
    except Timeout:
        raise HeldElsewhere(
            f"hydra.run.dir={directory} holds a run that another process is at: wait for its end, or choose another directory"
        ) from None
    try:
        yield
    finally:
        lock.release()


def claim(directory: Path, continuing: bool) -> None:
    """Refuses a directory that holds another run, unless that run is continued: nothing on disk is overwritten.

    Raises:
        SettingError: if a run is there.
    """
    if (directory / CONFIG).exists() and not continuing:
        raise SettingError(
            f"hydra.run.dir={directory} already holds a run: add ckpt=auto to go on with it, or choose another directory"
        )


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


def read_checkpoint(path: Path, setting: str) -> dict[str, Any]:
    """Returns what a checkpoint of this framework holds, loading nothing that could run code.

    Args:
        path: the file.
        setting: the setting that named it, for the refusal.

    Raises:
        SettingError: if the file is truncated, is no checkpoint of this framework, is of another version, or holds pickled
            objects.
    """
    import torch

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = checkpoint["config"]
        whole = isinstance(config["model"], dict) and isinstance(config["data"], dict) and checkpoint["state_dict"] is not None
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
    ):
        whole = False
    if not whole:
        raise SettingError(
            f"{setting}={path} is truncated, or was not written by this framework (no config in it, or more than tensors and "
            "plain values): give another checkpoint"
        )
    if checkpoint.get("format") != FORMAT:
        raise SettingError(
            f"{setting}={path} has format {checkpoint.get('format', 'none')}, but this version reads format {FORMAT}: use the "
            "version of this framework that wrote it"
        )
    return checkpoint


def first_free(taken: Callable[[int], bool], first: int = 1) -> int:
    """Returns the first number that is not taken: what is on disk is kept under its own."""
    return next(number for number in itertools.count(first) if not taken(number))


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a record at once, so that a file that is there is whole."""
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(json.dumps(record, indent=2) + "\n")
    draft.replace(path)


def same_model(theirs: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    """Refuses to continue a checkpoint of another model: weights that fit by accident would train on the wrong bound.

    Optimiser, learning rate, evaluation effort and what is kept in memory may change.

    Raises:
        SettingError: naming the first setting that differs.
    """
    free = {"optimizer", "lr_scheduler", "val_calls", "test_calls", "beta", "weighting", "timestep_sampler", "sampler"}
    for key, here in flatten({k: v for k, v in ours["model"].items() if k not in free}, "model"):
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
        if there.get(key) != here:
            raise SettingError(f"ckpt={path} was trained on other data: there {key}={there.get(key)}, here {key}={here}")


def same_optimizer(theirs: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    """Refuses another kind of optimiser, which cannot go on with the state of this one; its settings may change.

    Raises:
        SettingError: naming both.
    """
    there, here = (config["model"]["optimizer"]["_target_"] for config in (theirs, ours))
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
    there, here = checkpoint["config"]["data"]["batch_size"], ours["data"]["batch_size"]
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
