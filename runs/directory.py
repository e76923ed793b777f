"""Run directories: held by one process, claimed by one run, and the checkpoints that lie in them."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile

from runs.build import SettingError

if TYPE_CHECKING:
    from filelock import FileLock

CONFIG, RESULT, LAST, BEST = "config.yaml", "result.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt"
WRITING = ".writing.lock"  # held while an evaluation or a drawing is written
LOCK, WAIT = ".lock", 10.0  # seconds: DataLoader's workers keep what a killed job held until they notice, after five
FORMAT = 1  # of checkpoints: raised when what they hold changes its meaning


class HeldElsewhere(SettingError):
    """Another process is running the job of this directory."""


@contextmanager
def hold(directory: Path, wait: float | None = None) -> Iterator[Path]:
    """Keeps a run directory for this process, for the block; the system lets go of it however the process ends.

    What is refused before anything was written leaves no directory.

    Raises:
        HeldElsewhere: if another process keeps it still after ``wait`` seconds, by default ``WAIT``.
    """
    from filelock import Timeout

    lock = _lock(directory)
    try:
        lock.acquire(timeout=WAIT if wait is None else wait)
    except Timeout:
        raise HeldElsewhere(
            f"hydra.run.dir={directory} holds a run that another process is at: wait for its end, or choose another directory"
        ) from None
    try:
        yield directory
    except SettingError:
        if directory.is_dir() and [path.name for path in directory.iterdir()] == [LOCK]:
            (directory / LOCK).unlink()
            directory.rmdir()
        raise
    finally:
        lock.release()


def is_held(directory: Path) -> bool:
    """Whether another process keeps a run directory for itself."""
    from filelock import Timeout

    if not (directory / LOCK).exists():  # to ask leaves nothing
        return False
    try:
        with _lock(directory).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # nobody can write there
        return False


def _lock(directory: Path) -> FileLock:
    from filelock import FileLock

    return FileLock(directory / LOCK, is_singleton=True)  # a sweep's job is a run, which asks again


@contextmanager
def hold_free(directory: Path) -> Iterator[Path]:
    """Keeps the first of ``directory``, ``directory-2``, ... that is empty: runs that begin in one second have one name."""
    with ExitStack() as stack:
        for number in itertools.count(1):
            place = directory if number == 1 else directory.with_name(f"{directory.name}-{number}")
            place.mkdir(parents=True, exist_ok=True)
            with suppress(HeldElsewhere):
                stack.enter_context(hold(place, wait=0))
                if [path.name for path in place.iterdir()] == [LOCK]:
                    break
                stack.pop_all().close()
        yield place


@contextmanager
def one_writer(directory: Path) -> Iterator[None]:
    """Lets one process at a time choose a free number below a directory, and write under it, for the block.

    The lock is not a run's own: a run that is trained can be evaluated and drawn from meanwhile.
    """
    from filelock import FileLock

    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / WRITING):
        yield


def claim(directory: Path, again: bool) -> None:
    """Refuses a directory that holds a run that is not gone on with, or somebody's own config: nothing on disk is overwritten.

    Args:
        directory: the run's.
        again: whether a run that was killed before its first checkpoint may be begun anew.

    Raises:
        SettingError: if a run is there, or another config.
    """
    ends = [directory / RESULT, *(directory / "checkpoints").glob("*.ckpt")]
    begun = (directory / "metrics.csv").exists() and (directory / CONFIG).exists()
    if any(path.exists() for path in ends) or (begun and not again):
        way = " without a checkpoint to go on from:" if again else ": add ckpt=auto to go on with it, or"
        raise SettingError(f"hydra.run.dir={directory} already holds a run{way} choose another directory")
    if (directory / CONFIG).exists() and not _is_of_a_run(directory / CONFIG):
        raise SettingError(f"hydra.run.dir={directory} has a {CONFIG} that no run wrote: choose another directory")


def _is_of_a_run(path: Path) -> bool:
    import yaml

    try:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(written, dict) and {"model", "data", "trainer"} <= written.keys()


def read_checkpoint(path: Path, setting: str) -> dict[str, Any]:
    """Returns what a checkpoint of this framework holds, loading nothing that could run code.

    Args:
        path: the file.
        setting: the setting that named it, for the refusal.

    Raises:
        SettingError: if the file is truncated or damaged, is no checkpoint of this framework, is of another version, or
            holds pickled objects.
    """
    import torch

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = checkpoint["config"]
        whole = (
            isinstance(config["model"], dict)
            and isinstance(config["data"], dict)
            and isinstance(checkpoint["state_dict"], dict)
            and ZipFile(path).testzip() is None  # checksums, at which torch.load does not look
        )
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
        BadZipFile,
    ):
        whole = False
    if not whole:
        beside = [other for name in (BEST, LAST) if (other := path.with_name(Path(name).name)) != path and other.is_file()]
        raise SettingError(
            f"{setting}={path} is damaged or truncated, or was not written by this framework (no config in it, or more than "
            f"tensors and plain values): give another checkpoint{f', as {setting}={beside[0]}' if beside else ''}"
        )
    if checkpoint.get("format") != FORMAT:
        raise SettingError(
            f"{setting}={path} has format {checkpoint.get('format', 'none')}, but this version reads format {FORMAT}: use the "
            "version of this framework that wrote it"
        )
    return checkpoint


def higher_is_better(metric: str) -> bool:
    """Whether more of it is better, of the figures that result.json and metrics.csv hold."""
    return metric.split("/")[-1] in ("elbo", "reconstruction")


def first_free(taken: Callable[[int], bool]) -> int:
    """Returns the first number that is not taken: what is on disk is kept under its own."""
    return next(number for number in itertools.count(1) if not taken(number))


def withdraw_result(directory: Path) -> None:
    """Keeps the result of a run that now goes on under the next free number: until its end the run has none."""

    def kept(number: int) -> Path:
        return directory / f"{Path(RESULT).stem}-{number}.json"

    if (directory / RESULT).exists():
        (directory / RESULT).rename(kept(first_free(lambda number: kept(number).exists())))


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a draft to write to, which takes the file's place at the end of the block: a file that is there is whole.

    Raises:
        OSError: naming the file, also where the system does not say which one a full disk has no room for.
    """
    draft = path.with_name(f"{path.name}.tmp")
    try:
        yield draft
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(draft)):
            error.filename = str(path)
        raise
    draft.replace(path)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a record at once; JSON has no NaN and no infinity: they become null."""
    with whole(path) as draft:
        draft.write_text(as_json(record))


def as_json(record: dict[str, Any]) -> str:
    """Returns a record as text; JSON has no NaN and no infinity: they become null."""
    return json.dumps(_finite(record), indent=2, allow_nan=False) + "\n"


def write_picture(path: Path, picture: Any) -> None:
    """Writes a figure of matplotlib at once, and closes it."""
    from matplotlib import pyplot as plt

    with whole(path) as draft:
        picture.savefig(draft, dpi=140, format=path.suffix[1:])
    plt.close(picture)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
