"""What is printed may have no reader, from the start or any more: that ends no job, whose files have all of it."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import Any

GONE = (errno.EPIPE, errno.EIO)  # of a pipe that is read no more, of a terminal that was closed


def fill_closed() -> None:
    """Gives streams that the process began without (``>&-``) a place, which the next file that is opened would take."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)  # for the processes that this one begins, too
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def outlive_readers() -> None:
    """Has what is printed after its reader has gone (``| head -1``, a closed terminal) go nowhere: it would end the job."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # else a notebook's
            for name in ("write", "flush"):
                setattr(stream, name, _enduring(stream, getattr(stream, name)))


def _enduring(stream: TextIOWrapper, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def endure(*given: Any) -> Any:
        try:
            return call(*given)
        except OSError as error:
            if error.errno not in GONE:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # where what is still held back goes, too
            os.close(nowhere)
            with contextlib.suppress(OSError):
                return call(*given)

    return endure
