"""Images in files of bounded size, read by index without being held: what ``prepare.py`` writes and ``data=stream`` reads.

A set is a folder of ``.npy`` files, each uint8 (n, C, H, W), and ``manifest.json``, which is written last. Rows are read
with ``pread`` and not mapped into memory: what is resident is the batch alone, and a file that was cut short or a network
that failed is an error that can be reported, where a mapped page would end the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.arrays import read_header
from datamodules.base import DamagedDataError

MANIFEST, FORMAT = "manifest.json", 1  # the format is raised when what a set holds changes its meaning
OPEN_FILES = 256  # at once, in each process; systems commonly allow 1024
MEND = "copy it again, or make the set again with prepare.py"


class DamagedShardsError(DamagedDataError):
    """A set of shards is not what its manifest says."""


class Shard(NamedTuple):
    """One file of a set.

    Attributes:
        file: its name in the folder.
        num: images in it.
        bytes: its size.
        sha256: its checksum, in hexadecimal.
    """

    file: str
    num: int
    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """What a set holds.

    Attributes:
        name: of the data set.
        image_shape: (C, H, W).
        levels: number of values that a pixel takes, at most 256.
        splits: the files of each split, in order.
    """

    name: str
    image_shape: tuple[int, int, int]
    levels: int
    splits: dict[str, list[Shard]]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads ``manifest.json``.

        Raises:
            DamagedShardsError: if it is not there, damaged or of another version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise DamagedShardsError(
                f"data.root={folder} has no {MANIFEST}: make a set with python prepare.py out={folder} source=..., or set "
                "data.root to one"
            )
        try:
            record = json.loads(path.read_text())
            splits = {split: [Shard(**shard) for shard in shards] for split, shards in record["splits"].items()}
            manifest = cls(record["name"], tuple(record["image_shape"]), record["levels"], splits)
            known = record["format"]
            if known == FORMAT and not manifest._whole():
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            raise DamagedShardsError(f"{path} is damaged: make the set again with prepare.py, or copy it again") from None
        if known != FORMAT:
            raise DamagedShardsError(f"{path} has format {known}, but this version reads format {FORMAT}: make the set again")
        return manifest

    def _whole(self) -> bool:
        """Whether everything is there, and of its kind."""
        counts = [*self.image_shape, self.levels, *(n for of in self.splits.values() for shard in of for n in shard[1:3])]
        return (
            all(type(count) is int and count > 0 for count in counts)
            and len(self.image_shape) == 3
            and 2 <= self.levels <= 256
            and "train" in self.splits
            and all(self.splits.values())
        )

    def write(self, folder: Path) -> None:
        """Writes ``manifest.json``."""
        record = self._asdict() | {"splits": {k: [shard._asdict() for shard in v] for k, v in self.splits.items()}}
        (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, **record}, indent=1) + "\n")

    def num(self, split: str) -> int:
        """Returns how many images a split has."""
        return sum(shard.num for shard in self.splits.get(split, ()))

    def digest(self) -> str:
        """Returns 16 hexadecimal digits that any two sets of different images differ in."""
        sums = {split: [shard.sha256 for shard in shards] for split, shards in self.splits.items()}
        return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


class ShardedImages:
    """The images of one split, read when they are asked for; index n + i is image i mirrored.

    Args:
        folder: of the set.
        shards: the files of the split, in order.
        image_shape: (C, H, W).
        rows: which of the images in the files are meant, int64 (n,); by default all.

    Raises:
        DamagedShardsError: if a file is missing, or has not the size that the manifest says.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], image_shape: Sequence[int], rows: Tensor | None = None) -> None:
        self.folder, self.shards, self.image_shape, self.rows = folder, list(shards), tuple(image_shape), rows
        self.image_bytes = math.prod(self.image_shape)
        self.ends = np.cumsum([shard.num for shard in shards])
        self.sizes = np.array([shard.bytes for shard in shards])
        self.files: dict[int, Any] = {}
        for shard in shards:
            path = folder / shard.file
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                fault = "is missing" if size is None else f"is damaged: it has {size} bytes and not {shard.bytes}"
                raise DamagedShardsError(f"{path} {fault}; {MEND}")

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.rows is None else len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"files": {}}  # another process opens the files for itself

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Reads the images of ``index`` (b,): uint8 (b, C, H, W).

        Raises:
            DamagedShardsError: if a file cannot be read, is too short by now, or begins otherwise than the manifest says.
        """
        num = len(self)
        batch = np.empty((len(index), self.image_bytes), dtype=np.uint8)
        places, starts = self._find(index % num)
        for image, place, start in zip(batch, places, starts, strict=True):
            self._read(image, place, start)
        batch = batch.reshape(-1, *self.image_shape)
        mirrored = (index >= num).numpy().nonzero()[0]
        batch[mirrored] = batch[mirrored, ..., ::-1]
        return torch.from_numpy(batch)

    def read_ahead(self, first: int, stop: int) -> None:
        """Asks the system to fetch images ``first`` to ``stop`` (exclusive) in one go, before they are read one by one."""
        if not hasattr(os, "posix_fadvise"):  # macOS has none
            return
        (one, other), (start, end) = self._find(torch.tensor([first, stop - 1]))
        end += self.image_bytes
        for place in range(one, other + 1):
            low, high = start if place == one else 0, end if place == other else int(self.sizes[place])
            with contextlib.suppress(OSError):  # whoever reads the images says what is wrong
                os.posix_fadvise(self._file(place).fileno(), low, high - low, os.POSIX_FADV_WILLNEED)

    def verify(self) -> None:
        """Reads everything once.

        Raises:
            DamagedShardsError: if a file has not the checksum that the manifest says.
        """
        for shard in self.shards:
            checksum = hashlib.sha256()
            with (self.folder / shard.file).open("rb") as file:
                while part := file.read(2**20):
                    checksum.update(part)
            if checksum.hexdigest() != shard.sha256:
                raise DamagedShardsError(f"{self.folder / shard.file} is damaged: its checksum is not the manifest's; {MEND}")

    def _find(self, images: Tensor) -> tuple[list[int], list[int]]:
        """Returns in which file each image is, and at which byte it starts."""
        rows = (images if self.rows is None else self.rows[images]).numpy()
        places = np.searchsorted(self.ends, rows, side="right")
        # counted from the end, because .npy files begin with a header
        return places.tolist(), (self.sizes[places] - (self.ends[places] - rows) * self.image_bytes).tolist()

    def _read(self, image: np.ndarray, place: int, start: int) -> None:
        try:
            num_bytes = os.preadv(self._file(place).fileno(), (image,), start)
        except OSError as error:
            raise DamagedShardsError(f"{self.folder / self.shards[place].file} cannot be read: {error.strerror}") from None
        if num_bytes != self.image_bytes:
            raise DamagedShardsError(f"{self.folder / self.shards[place].file} has become too short; {MEND}")

    def _file(self, place: int) -> Any:
        if place not in self.files:
            if len(self.files) >= OPEN_FILES:
                self.files.pop(next(iter(self.files))).close()  # the one opened first
            self.files[place] = self._opened(self.shards[place])
        return self.files[place]

    def _opened(self, shard: Shard) -> Any:
        path = self.folder / shard.file
        file = path.open("rb", buffering=0)
        try:
            header = read_header(file)
        except ValueError:
            header = None
        if header != ((shard.num, *self.image_shape), False, np.uint8):
            file.close()
            raise DamagedShardsError(
                f"{path} or {MANIFEST} is damaged: it holds other than {shard.num} images of {list(self.image_shape)}; {MEND}"
            )
        return file


class _Checksummed:
    """A file that knows the checksum of what was written to it."""

    def __init__(self, file: Any) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, part: Any) -> None:
        self.sha256.update(part)
        self.file.write(part)


def write_split(
    folder: Path, split: str, image_shape: Sequence[int], num: int, shard_bytes: int, chunks: Iterator[np.ndarray]
) -> list[Shard]:
    """Writes a split's files, holding one chunk at a time.

    Args:
        folder: where to.
        split: begins the files' names.
        image_shape: (C, H, W).
        num: images in all chunks together.
        shard_bytes: upper bound on the images in one file, which has at least one image.
        chunks: uint8 (n, C, H, W), any n.

    Returns:
        The files.
    """
    most = max(1, shard_bytes // math.prod(image_shape))
    shards, rest = [], np.empty((0, *image_shape), dtype=np.uint8)
    for start in range(0, num, most):
        size = min(most, num - start)
        path = folder / f"{split}-{start // most:05}.npy"
        header = {"descr": "|u1", "fortran_order": False, "shape": (size, *image_shape)}
        with path.open("wb") as raw:
            file = _Checksummed(raw)
            np.lib.format.write_array_header_1_0(file, header)
            while size:
                rest = rest if len(rest) else next(chunks)
                file.write(np.ascontiguousarray(rest[:size]).data)
                size, rest = size - len(rest[:size]), rest[size:]
        shards.append(Shard(path.name, header["shape"][0], path.stat().st_size, file.sha256.hexdigest()))
    return shards
