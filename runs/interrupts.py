"""Ctrl-C while a command's libraries are imported, which takes seconds: it ends at once, as a program that has not begun."""

from __future__ import annotations

import signal


def end_at_once() -> None:
    """Has Ctrl-C end the process without a traceback, unless it is ignored, as in a shell's background."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def listen() -> None:
    """Has Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
