"""How an entry point starts and ends: what is refused, by Hydra too, is said in one sentence."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import re
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from runs.composing import is_of_composing, sentence
from runs.faults import fate_of_another_rank, is_fault
from runs.help import help_text
from runs.interrupts import listen
from runs.lifelines import BEGUN_BY, end_rank_with_parent
from runs.output import fill_closed, outlive_readers

FULL = "HYDRA_FULL_ERROR"
WITH_VALUE = (  # of Hydra's flags
    "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--cfg", "-c", "--package", "-p",
    "--experimental-rerun",
)  # fmt: skip
INTERRUPTED, TERMINATED = 130, 143  # exit codes after Ctrl-C and SIGTERM, as shells have them

_loaded = False  # whether this process has imported what a job needs
_asked = False  # whether the user set HYDRA_FULL_ERROR=1, to see how each error came about


def spin_briefly() -> None:
    """Has OpenMP's threads wait for microseconds before they sleep; torch must not be loaded yet, nor a policy be set.

    GNU's library lets them spin for milliseconds, which makes steps several times slower where processes share cores. Sleeping
    at once makes those of small models 1.7 times as slow where they do not.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@contextmanager
def loading() -> Iterator[None]:
    """Keeps the garbage collector off what is imported inside: as it comes, and when the process ends.

    What modules hold stays. To search torch's and Lightning's again and again takes two fifths of what importing them takes.
    A later job of the same process imports nothing: what the one before it has left must be found, or its data would stay.
    """
    global _loaded
    if _loaded:
        yield
        return
    _loaded = True
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(_let_go)


def _let_go() -> None:
    """Has the interpreter's end free what modules hold, where bindings by nanobind (Triton's) would list all of it."""
    if any(kind.__module__ == "nanobind" for kind in type.__subclasses__(type)):
        gc.unfreeze()


def take_lazy_help() -> None:
    """Has argparse take a help text that is made only when it is shown, as Hydra 1.3 gives it one.

    From Python 3.14 on argparse checks that help is text, and no command would start (facebookresearch/hydra#3121).
    """
    if hasattr(ArgumentParser, "_check_help"):
        check = ArgumentParser._check_help
        ArgumentParser._check_help = lambda self, action: check(self, action) if isinstance(action.help, str) else None


def print_what_a_terminal_lacks() -> None:
    """Has a sign that the terminal's encoding lacks, or a name that is no text, printed by its number, here and in children."""
    if isinstance(sys.stdout, TextIOWrapper):  # else a notebook's, which takes all
        sys.stdout.reconfigure(errors="backslashreplace")
    encoding = os.environ.get("PYTHONIOENCODING", "").partition(":")[0]
    os.environ["PYTHONIOENCODING"] = f"{encoding}:backslashreplace"


def start(main: Callable[[], object]) -> None:
    """Runs a ``hydra.main`` function.

    ``--help`` is answered at once. A misspelt group, choice or setting ends it with one line and exit code 1, Ctrl-C with
    exit code 130.

    Args:
        main: the decorated function.
    """
    listen()
    fill_closed()
    end_rank_with_parent()
    os.environ[BEGUN_BY] = str(os.getpid())
    spin_briefly()
    take_lazy_help()
    print_what_a_terminal_lacks()
    outlive_readers()
    logging.getLogger("torch").setLevel(logging.WARNING)  # else a Ctrl-C while it is imported has it print of its caches
    sys.argv[1:] = flags_first(sys.argv[1:])
    for item in sys.argv[1:]:
        if re.fullmatch(r"paths\.output_dir=(null|~)?", item):  # Hydra makes the folder before anything else is looked at
            sys.exit(f"error: {item}: give the folder for run directories, or leave it out")
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(Path(sys.argv[0]).stem))
        return
    global _asked
    _asked = os.environ.get(FULL) == "1" and not is_later_rank()  # of those the first one sets it
    os.environ[FULL] = "1"  # Hydra then raises what it would print over many lines
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (HydraException, OmegaConfBaseException) as error:
        if _asked:
            raise
        sys.exit(f"error: {sentence(error)}")
    except (ValueError, YAMLError) as error:
        if _asked or not is_of_composing(error):
            raise
        sys.exit(f"error: {sentence(error)}")
    except OSError as error:
        end_by(error)
    finally:
        if not _asked:
            os.environ.pop(FULL, None)


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Puts Hydra's own flags before the overrides, all of which argparse wants together."""
    flags, overrides, rest = [], [], list(arguments)
    while rest:
        item = rest.pop(0)
        own = item.startswith("-")
        (flags if own else overrides).append(item)
        named = item in WITH_VALUE or (item[:2] == "--" and item[2:] and any(flag.startswith(item) for flag in WITH_VALUE))
        takes = named or (item in ("-i", "--info") and rest and re.fullmatch(r"[a-z][a-z-]*", rest[0]))
        if own and takes and rest:
            flags.append(rest.pop(0))
    return [*flags, *overrides]


def is_later_rank() -> bool:
    """Whether this process is not the first of its node: what all of them meet is said once."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def told(error: Exception) -> str:
    """Returns what is printed of a refusal: its sentence, after the traceback of the fault of code it came from, if it did.

    With HYDRA_FULL_ERROR=1 how it came about is always told.
    """
    shown = error if _asked else error.__cause__
    if shown is None or not (_asked or is_fault(shown)):
        return f"error: {error}"
    return "".join([*traceback.format_exception(type(shown), shown, shown.__traceback__), f"error: {error}"])


def refusal(error: OSError) -> str:
    """Returns what the system has to say; of a full disk it does not say for which file."""
    return f"{error.filename or 'a file cannot be read or written'}: {error.strerror or error}"


def end_by(error: OSError) -> NoReturn:
    """Ends the process in one sentence of what the system refused."""
    if _asked or error.strerror is None:
        raise error
    advice = "; choose another place by hydra.run.dir or paths.output_dir" if Path(sys.argv[0]).stem == "train" else ""
    sys.exit(f"error: {refusal(error)}{advice}")


@contextmanager
def refusals() -> Iterator[None]:
    """Ends the process in one sentence where the block is refused, by a setting or by the system."""
    from runs.build import RankError, SettingError

    try:
        yield
    except SettingError as error:
        sys.exit(1 if is_later_rank() and not isinstance(error, RankError) else told(error))  # said once, by rank 0
    except OSError as error:
        end_by(error)


def finish(run: Callable[[DictConfig], tuple[object, bool]], cfg: DictConfig) -> object:
    """Runs a job that Fabric's ranks may share, and ends the process where it was refused or interrupted.

    Args:
        run: config -> (what the job gives, whether Ctrl-C cut it short).
        cfg: the job's.
    """
    from datamodules.base import DamagedDataError
    from runs.build import RankError

    with refusals():
        try:
            given, interrupted = run(cfg)
        except DamagedDataError as error:
            raise RankError(str(error)) from None
        except RuntimeError as error:
            rank, fate = _rank_of_several(), fate_of_another_rank(error)
            if rank is None or fate is None:
                raise
            raise RankError(f"rank {rank} {fate}") from None
    if interrupted:  # Lightning kills rank 0, which may be writing, when a child of its ends with another code than 0
        sys.exit(0 if is_later_rank() else INTERRUPTED)
    return given


def _rank_of_several() -> int | None:
    """Returns which rank this process is of those that have met; ``None`` where it is alone."""
    from torch import distributed

    met = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return distributed.get_rank() if met else None
