"""What a job prints: libraries keep to warnings, rank 0 speaks, and what goes wrong in training is one sentence."""

from __future__ import annotations

import logging
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from runs.build import RankError, SettingError
from runs.entry import refusal
from runs.faults import fate_of_another_rank, is_fault, is_somebodys

LAUNCHER = "lightning.fabric.strategies.launchers.subprocess_script"


class LastWords(logging.Handler):
    """Says why this process ends, where Lightning is about to kill it because a rank that it began has ended.

    Lightning does so when it sees the end and this rank does not, which waits for nobody just then.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Says it to stderr."""
        if found := re.search(r"rank: (\d+)\].* terminated with code (-?\d+)", record.getMessage()):
            rank, code = found[1], int(found[2])
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            print(f"error: rank {rank} {how}, and with it the others", file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Leaves of libraries' lines the warnings, once each: what a run does is said here, in fewer words."""
    lightning = logging.getLogger("lightning")
    lightning.handlers.clear()  # Hydra's root handler prints them already
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    launcher = logging.getLogger(LAUNCHER)
    launcher.setLevel(logging.INFO)
    launcher.handlers, launcher.propagate = [LastWords()], False
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
        if trainer.world_size > 1 and (fate := fate_of_another_rank(error)):
            raise RankError(f"rank {trainer.global_rank} {fate}") from None
        if is_fault(error) or is_somebodys(error):
            raise
        raise SettingError(" ".join(str(error).split())) from error  # Lightning's look at what a callback was given
