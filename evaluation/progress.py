"""Progress of an evaluation: a live bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS = 5.0  # between two lines


@contextmanager
def progress(title: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Shows how much of ``total`` is done; the block calls what it is given with how much was added.

    Args:
        title: what is being done.
        total: its size.
        quiet: shows nothing, as on ranks above 0.
    """
    if quiet:
        yield lambda _: None
    elif sys.stdout.isatty():
        with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task(title, total=total)
            yield lambda added: bar.advance(task, added)
    else:
        start = last = time.monotonic()
        count = 0

        def line(added: int) -> None:
            nonlocal last, count
            count += added
            now = time.monotonic()
            if now - last >= SECONDS:
                last = now
                print(f"{title}: {min(count, total)}/{total}   {now - start:.0f} s", flush=True)

        yield line
