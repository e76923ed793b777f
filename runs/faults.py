"""Which errors are refusals, whose sentence is all there is to say, and which are faults of code, whose place matters most."""

from __future__ import annotations

import dis
import sysconfig
from pathlib import Path
from types import FrameType

PACKAGES = (
    "losses",
    "diffusion",
    "networks",
    "datamodules",
    "lightning_modules",
    "callbacks",
    "loggers",
    "runs",
    "evaluation",
    "sampling",
    "comparison",
    "hydra_plugins",
)
LOST = ("closed by peer", "Connection reset", "Broken pipe", "Connection refused")  # how gloo says that a rank has gone
LATE = ("Timed out waiting", "Timed out after")  # that one does not answer, or never came
STANDARD = Path(sysconfig.get_path("stdlib")).resolve()
INSTALLED = {"site-packages", "dist-packages"}


def is_fault(error: BaseException) -> bool:
    """Whether an error comes from a mistake in code, and not from somebody's look at what was given.

    A refusal is raised by a ``raise`` in this framework's code or in somebody's own, or by Lightning about its settings; so is
    what the system has to say of a file that this framework reads or writes. An error that Python or a library met while such
    code was running is a fault of the code.
    """
    frames = _frames(error)
    own = _innermost_own(frames)
    if own is None or type(error).__module__.partition(".")[0] in PACKAGES:  # which a loader raises again of its worker's
        return False  # a library's own look at settings, or a refusal by its kind
    ours, (last, place) = _package(own) in PACKAGES, frames[-1]
    if ours and isinstance(error, OSError):
        return False
    on_purpose = dis.opname[last.f_code.co_code[place]] == "RAISE_VARARGS"
    return not (on_purpose and (last is own or (ours and _package(last) == "lightning")))


def fate_of_another_rank(error: BaseException) -> str | None:
    """Returns what this rank is to say of another one that the error is about; ``None`` if it is about none."""
    if any(sign in str(error) for sign in LOST):
        return "has lost another one, which ended before it"
    if any(sign in str(error) for sign in LATE):
        return "has waited in vain for another one, which hangs, is far slower or never began"
    return None


def is_somebodys(error: BaseException) -> bool:
    """Whether the innermost code that is no library's is not this framework's either."""
    own = _innermost_own(_frames(error))
    return own is not None and _package(own) not in PACKAGES


def _innermost_own(frames: list[tuple[FrameType, int]]) -> FrameType | None:
    """Returns the last frame that is no library's."""
    return next((frame for frame, _ in reversed(frames) if not _is_library(frame)), None)


def _frames(error: BaseException) -> list[tuple[FrameType, int]]:
    """Returns the frames that an error came through, innermost last, each with the place in its byte code."""
    frames, step = [], error.__traceback__
    while step is not None:
        frames.append((step.tb_frame, step.tb_lasti))
        step = step.tb_next
    return frames


def _is_library(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return file.startswith("<") or not INSTALLED.isdisjoint(Path(file).parts) or STANDARD in Path(file).resolve().parents


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
