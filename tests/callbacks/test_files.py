"""Files that are there whole or not at all, and errors that name them."""

import errno
import re
from pathlib import Path

import pytest

import callbacks.files
import runs.directory

FULL = (errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("whole", [callbacks.files.whole, runs.directory.whole])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FULL, "[Errno 28] No space left on device: 'a.png'"),
        ((*FULL, "a.png.tmp"), "[Errno 28] No space left on device: 'a.png'"),
        ((errno.ENOENT, "No such file or directory", "font.ttf"), "[Errno 2] No such file or directory: 'font.ttf'"),
        (("encoder error -2 when writing image file",), "encoder error -2 when writing image file"),
    ],
)
def test_an_error_names_the_file_that_cannot_be_written_and_no_other(whole, error, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write():
        with whole(Path("a.png")) as draft:
            draft.touch()
            raise OSError(*error)

    with pytest.raises(OSError, match=re.escape(said) + "$"):
        write()
    assert not list(tmp_path.iterdir())
