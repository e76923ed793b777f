"""Files of a run that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a draft to write to, which takes the file's place at the end of the block; its folder is made if it is missing.

    A process that is killed leaves the file before: half of one would be read, and shown in a comparison, as all of it. The
    twin of this in ``runs.directory`` is for what must not import torch, as this package does.

    Raises:
        OSError: naming the file, also where the system does not say which one a full disk has no room for.
    """
    draft = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield draft
    except BaseException as error:
        draft.unlink(missing_ok=True)
        # of a copy, the draft is the second file that is named; an error without a number has words of its own
        if isinstance(error, OSError) and error.errno and str(draft) in (str(error.filename or draft), str(error.filename2)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    draft.replace(path)
