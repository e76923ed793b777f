"""Images in ``.npz`` files, read a piece at a time: ImageNet-32 and -64 as published, or plain arrays.

Published files of downsampled ImageNet (Chrabaszcz et al. 2017) hold ``data``, uint8 (N, C·S·S) with one colour plane after
the other, beside labels and a mean. Nothing is unpickled.
"""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamodules.files import MissingDataError

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
LAYOUTS = "(N, C*S*S), (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3"


class ImageArray(NamedTuple):
    """One array of images in a file.

    Attributes:
        path: the file.
        member: the array in it.
        shape: of the array.
        image_shape: (C, H, W).
        channels_last: whether the array is (N, H, W, C).
    """

    path: Path
    member: str
    shape: tuple[int, ...]
    image_shape: tuple[int, int, int]
    channels_last: bool

    @classmethod
    def open(cls, path: Path) -> ImageArray:
        """Looks at the arrays' headers and finds the one that is images: ``data``, or the only uint8 array.

        Raises:
            ValueError: if there is none, or the file is damaged.
        """
        try:
            with zipfile.ZipFile(path) as file:
                headers = {name: _header(file, name) for name in file.namelist() if name.endswith(".npy")}
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError, OSError) as error:
            raise ValueError(f"source: {path} is damaged or no .npz file ({error}); take it away or get it again") from None
        named = {"data.npy": headers["data.npy"]} if "data.npy" in headers else headers
        arrays = {name: rest for name, (*rest, dtype) in named.items() if dtype == np.uint8 and len(rest[0]) > 1}
        images = {name: shape for name, (shape, fortran) in arrays.items() if shape[0] and not fortran}
        if not images and len(arrays) == 1:
            ((shape, _),) = arrays.values()
            fault = "is in Fortran's order: save numpy.ascontiguousarray of it" if shape[0] else "has no image: take it away"
            raise ValueError(f"source: the array of {path}, {_listed(named)}, {fault}")
        if len(images) != 1:
            raise ValueError(
                f"source: {path} holds {_listed(headers)}, where one array of images is expected: uint8 (0..255, C order), "
                "named data or the only uint8 array of the file"
            )
        ((name, shape),) = images.items()
        image_shape, channels_last = layout(shape, path)
        return cls(path, name, shape, image_shape, channels_last)

    def chunks(self, num_bytes: int) -> Iterator[np.ndarray]:
        """Yields the images in order, uint8 (n, C, H, W), in pieces of about ``num_bytes``.

        Raises:
            ValueError: if the file is damaged.
        """
        size, most = math.prod(self.shape[1:]), max(1, num_bytes // math.prod(self.shape[1:]))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
                read_header(file)
                for start in range(0, self.shape[0], most):
                    num = min(most, self.shape[0] - start)
                    piece = np.frombuffer(file.read(num * size), dtype=np.uint8).reshape(num, *self.shape[1:])
                    piece = piece.transpose(0, 3, 1, 2) if self.channels_last else piece
                    yield piece.reshape(num, *self.image_shape)
                if file.read(1):  # at the end, its checksum is compared
                    raise ValueError("it goes on after its last image")
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
            raise ValueError(f"source: {self.path} is damaged ({error}); get it again") from None


def layout(shape: tuple[int, ...], path: Path) -> tuple[tuple[int, int, int], bool]:
    """Returns ((C, H, W), whether channels come last) of an array of images.

    (N, P) is planar: C = 1 if P is a square, C = 3 if P/3 is (never both). (N, H, W) is grey. Of four axes the last is the
    channels if it is 1 or 3, else the second.

    Raises:
        ValueError: if it is none of these, or both could be the channels.
    """
    if len(shape) == 2:
        for channels in (1, 3):
            side = math.isqrt(shape[1] // channels)
            if side and channels * side * side == shape[1]:
                return (channels, side, side), False
    elif len(shape) == 3 and min(shape[1:]):
        return (1, *shape[1:]), False
    elif len(shape) == 4 and min(shape[1:]) and (shape[3] in (1, 3)) != (shape[1] in (1, 3)):
        return ((shape[3], *shape[1:3]), True) if shape[3] in (1, 3) else (shape[1:], False)
    raise ValueError(f"source: {path} has an array of shape {shape}, which is none of {LAYOUTS}: bring it into one of them")


def find_arrays(source: str) -> dict[str, list[ImageArray]]:
    """Returns the arrays of each split, from a folder of ``.npz`` files or a glob.

    Files whose names begin with ``val`` or ``test`` are those splits, all others are training images. If no file is
    called test, those called val are the test split: ImageNet's published validation images are what papers test on.

    Raises:
        MissingDataError: if there is no file, or none of training images.
        ValueError: if a file is damaged, or has images of another shape than the others.
    """
    path = Path(source).expanduser()
    # a file's name may look like a glob, as a[1].npz does
    found = path.glob("*.npz") if path.is_dir() else [path] if path.is_file() else map(Path, glob(str(path)))
    files = sorted(found, key=_natural)
    splits: dict[str, list[ImageArray]] = {"train": [], "val": [], "test": []}
    for file in files:
        split = next((split for split in ("val", "test") if file.name.lower().startswith(split)), "train")
        splits[split].append(ImageArray.open(file))
    if not splits["train"]:
        raise MissingDataError(
            f"source={source}: found {len(files)} .npz files, none of training images; give a folder of .npz files or a glob, "
            "or choose a folder of pictures by data=image_folder data.root=..."
        )
    if not splits["test"]:
        splits["test"], splits["val"] = splits["val"], []
    expected = splits["train"][0]
    for array in (array for arrays in splits.values() for array in arrays):
        if array.image_shape != expected.image_shape:
            raise ValueError(
                f"source: {array.path} has images of {list(array.image_shape)}, but {expected.path} of "
                f"{list(expected.image_shape)}; give files of one shape"
            )
    return {split: arrays for split, arrays in splits.items() if arrays}


def _natural(path: Path) -> list[str | int]:
    """Orders batch 10 after batch 2."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _header(file: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], bool, Any]:
    with file.open(name) as member:
        return read_header(member)


def read_header(file: Any) -> tuple[tuple[int, ...], bool, Any]:
    """Returns (shape, whether in Fortran's order, dtype) of the .npy file that begins here.

    Raises:
        ValueError: if none does, or one of an unknown version.
    """
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"version {version} of numpy's format is unknown")
    return HEADERS[version](file)


def _listed(headers: dict[str, Any]) -> str:
    arrays = (f"{name.removesuffix('.npy')} {dtype}{list(shape)}" for name, (shape, _, dtype) in headers.items())
    return ", ".join(arrays) or "no array"
