"""Processes that a job or a sweep has begun end with it, however it ends: ranks, and the workers of a sweep over cores."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

BEGUN_BY = "RUNS_BEGUN_BY"  # in the environment of what a job or a sweep begins: its process id
PR_SET_PDEATHSIG = 1

_stopped = False  # whether this worker was asked to stop


def end_with_parent(number: int) -> None:
    """Has Linux send this process a signal when the one that began it ends; elsewhere nothing is done.

    The system waits for the thread that began it. Lightning begins ranks in the main thread; joblib begins workers there, or in
    a thread that waits for their end.

    Args:
        number: the signal, which is sent at once if the end came before this call.
    """
    if sys.platform != "linux" or BEGUN_BY not in os.environ:
        return
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if parent_is_gone():
        os.kill(os.getpid(), number)


def parent_is_gone() -> bool:
    """Whether the process that began this one has ended: Linux's word; elsewhere it is not asked."""
    begun_by = os.environ.get(BEGUN_BY)
    if sys.platform != "linux" or begun_by is None or os.getppid() == int(begun_by):
        return False
    try:  # an interpreter may be behind a script, which is the parent then
        return Path(f"/proc/{begun_by}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def end_rank_with_parent() -> None:
    """Has a rank that Lightning began end with its first one, which may be ended before the two have met.

    It would wait for the first one for half an hour. What torchrun or SLURM began is theirs to end.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0" and not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys():
        end_with_parent(signal.SIGKILL)


def end_in_peace() -> None:
    """Has Lightning no longer kill this rank for the end of one that it began: its own job is over, and is being closed.

    After Ctrl-C Lightning ends them itself, and would kill this one for it within five seconds.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []


@contextmanager
def in_worker() -> Iterator[None]:
    """Has SIGTERM stop the job inside the block as Ctrl-C does, and so the end of the sweep's process.

    Nor does this worker begin another job then, of those that joblib has sent it already.
    """
    global _stopped
    if _stopped:
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, _stop)
    try:
        end_with_parent(signal.SIGTERM)
        yield
    except KeyboardInterrupt:
        _stopped = True
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if parent_is_gone():  # and with it who would end this process, which would wait for minutes for a next job
            sys.stdout.flush()
            os._exit(1)


def _stop(number: int, frame: FrameType | None) -> None:
    global _stopped
    if is_lightnings(_stop) or _stopped:
        return
    _stopped = True
    raise KeyboardInterrupt


def is_lightnings(handler: object) -> bool:
    """Whether Lightning hears SIGTERM now: it ends training after a batch, and calls the handler that was there, too."""
    return signal.getsignal(signal.SIGTERM) != handler
