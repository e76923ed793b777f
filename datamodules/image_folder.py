"""Any folder of pictures: resized on the shorter side, cropped at the centre, kept in memory if they fit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import InterpolationMode, center_crop, pil_to_tensor, resize
from tqdm import tqdm

from datamodules.base import DamagedDataError, ImageDataModule, Images, shuffled
from datamodules.files import MissingDataError
from datamodules.sampling import MOST_WORKERS, at_least

# torchvision's, and others that Pillow decodes to one picture
FORMATS = (*IMG_EXTENSIONS, ".avif", ".gif", ".jfif", ".jpe", ".jp2", ".j2k", ".pbm", ".pnm", ".tga")


class UnreadablePictureError(DamagedDataError):
    """A picture cannot be decoded."""


def eight_bits(picture: Image.Image, path: Path, file: Image.Image) -> Image.Image:
    """Returns a picture of 16-bit grey levels as one of 8 bits, and others as they are; Pillow would cut off what is above 255.

    Args:
        picture: what was decoded.
        path: of the file.
        file: as Pillow opened it.

    Raises:
        UnreadablePictureError: for numbers whose range the file does not tell.
    """
    # 16 bits, too: older versions open PNG files so, and all of them netpbm's, whose stated white becomes 65535
    sixteen = picture.mode == "I" and file.format in ("PNG", "PPM")
    if picture.mode == "F" or (picture.mode == "I" and not sixteen):
        raise UnreadablePictureError(
            f"image_folder: {path} holds 32-bit numbers (mode {picture.mode}), whose black and white are unknown: convert it "
            "to 8 or 16 bits"
        )
    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture
    # TIFF says how many bits there are and which end is white, of which Pillow leaves 12 as they are and 0 for white black
    tags = getattr(file, "tag_v2", {})
    grey = np.asarray(picture) / (2 ** tags.get(BITSPERSAMPLE, (16,))[0] - 1)
    grey = 1 - grey if tags.get(PHOTOMETRIC_INTERPRETATION) == 0 else grey
    return Image.fromarray(np.rint(255 * grey).astype(np.uint8))


class Pictures:
    """Pictures on disk, decoded when they are asked for; index n + i is picture i mirrored.

    Args:
        paths: the n files.
        image_size: S, height and width of a decoded picture.
        channels: C, 3 for RGB and 1 for grey.
    """

    def __init__(self, paths: Sequence[Path], image_size: int, channels: int) -> None:
        self.paths, self.image_size, self.channels = paths, image_size, channels

    def __len__(self) -> int:
        return len(self.paths)

    def decode(self, path: Path) -> Tensor:
        """Decodes one file: uint8 (C, S, S).

        Raises:
            UnreadablePictureError: if it is no picture, or a damaged one.
        """
        try:
            with Image.open(path) as file:
                picture = eight_bits(ImageOps.exif_transpose(file), path, file)
            picture = picture.convert("L" if self.channels == 1 else "RGB")
            picture = resize(picture, self.image_size, InterpolationMode.BICUBIC)
            return pil_to_tensor(center_crop(picture, self.image_size))
        except UnreadablePictureError:
            raise
        except Image.DecompressionBombError:
            raise UnreadablePictureError(
                f"image_folder: {path} has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, which are not decoded for the "
                "memory they would take: scale it down or take it away"
            ) from None
        except Exception:  # decoders raise errors of many kinds
            raise _unreadable(path) from None

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Decodes the pictures of ``index`` (b,): uint8 (b, C, S, S)."""
        num = len(self.paths)
        pictures = [(self.decode(self.paths[i % num]), i >= num) for i in index.tolist()]
        return torch.stack([picture.flip(-1) if mirrored else picture for picture, mirrored in pictures])

    def decode_all(self, title: str, quiet: bool) -> Tensor:
        """Decodes all files, in threads: uint8 (n, C, S, S).

        Raises:
            UnreadablePictureError: naming the files that cannot be decoded.
        """
        images = torch.empty((len(self.paths), self.channels, self.image_size, self.image_size), dtype=torch.uint8)

        def fill(i: int) -> str | None:
            try:
                images[i] = self.decode(self.paths[i])
            except UnreadablePictureError as error:
                return str(error)
            return None

        with ThreadPoolExecutor() as pool:
            results = pool.map(fill, range(len(images)))
            # None: where there is no terminal, as a log file is none
            bad = [fault for fault in tqdm(results, title, len(images), disable=quiet or None) if fault]
        if bad:
            raise UnreadablePictureError(bad[0] + (f" ({len(bad) - 1} others are like it)" if len(bad) > 1 else ""))
        return images


class ImageFolderDataModule(ImageDataModule):
    """Pictures below a folder, however deep, in any format of :data:`FORMATS`.

    The folders ``train``, ``val`` and ``test`` below it are the splits. Validation or test pictures that have no folder are
    cut, by ``split_seed``, from ``train``, or from all other pictures if there is no ``train``. Links are followed.

    Args:
        root: the folder.
        image_size: height and width in pixels.
        channels: 3 for RGB, 1 for grey.
        horizontal_flip: whether training pictures are mirrored with probability 1/2.
        val_fraction: share of the pictures held out for validation, if there is no folder ``val``.
        test_fraction: share of the pictures held out for the test, if there is no folder ``test``.
        max_memory_gb: decoded pictures (with mirror images) are kept in memory up to this size, else read again and again.
        num_workers: processes that read pictures, if they are not kept in memory.
        shared: the settings of :class:`ImageDataModule`.

    Raises:
        ValueError: if a setting is out of range.
    """

    name = "image_folder"

    def __init__(
        self,
        root: str,
        image_size: int,
        channels: int = 3,
        horizontal_flip: bool = False,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        max_memory_gb: float = 2.0,
        num_workers: int = 2,
        **shared: Any,
    ) -> None:
        at_least("data.image_size", image_size, 1)
        if channels not in (1, 3):
            raise ValueError(f"data.channels={channels}: choose 3 for RGB or 1 for grey")
        for setting, fraction in {"val_fraction": val_fraction, "test_fraction": test_fraction}.items():
            if not 0 < fraction < 1:
                raise ValueError(f"data.{setting}={fraction}: give a fraction above 0 and below 1")
        if val_fraction + test_fraction >= 1:
            both = f"data.val_fraction={val_fraction} and data.test_fraction={test_fraction}"
            raise ValueError(f"{both}: their sum must be below 1, hold fewer pictures out")
        if max_memory_gb < 0:
            raise ValueError(f"data.max_memory_gb={max_memory_gb}: give a number of gigabytes, 0 to keep nothing in memory")
        super().__init__(**shared, actual_shape=(channels, image_size, image_size), actual_levels=256, flip=horizontal_flip)
        self.root, self.max_bytes = Path(root).expanduser(), max_memory_gb * 1e9
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.loading_workers = at_least("data.num_workers", num_workers, 0, MOST_WORKERS)

    def find(self) -> dict[str, list[Path]]:
        """Returns the files of each split.

        Raises:
            MissingDataError: if a split has none.
        """
        if not self.root.is_dir():
            raise MissingDataError(
                f"image_folder: {self.root.absolute()} is no folder; set data.root to where the pictures are"
            )
        given = {split: _pictures(self.root / split) for split in ("train", "val", "test") if (self.root / split).is_dir()}
        # by file and not by name: val and test may be links to some of the other pictures
        held_out = {_file(path) for split in ("val", "test") for path in given.get(split, ())}
        pool = given.get("train") or [path for path in _pictures(self.root) if not held_out or _file(path) not in held_out]
        order = [pool[i] for i in shuffled(len(pool), self.split_seed).tolist()]
        for split in ("val", "test"):
            if split not in given:
                num = max(1, round(self.fractions[split] * len(pool)))
                given[split], order = order[:num], order[num:]
        splits = {"train": order, "val": given["val"], "test": given["test"]}
        if not all(splits.values()):
            raise MissingDataError(
                f"image_folder: {self.root.absolute()} has {', '.join(f'{len(p)} {s}' for s, p in splits.items())} pictures "
                f"({' '.join(FORMATS)}); put some there, or set data.root to where they are"
            )
        return splits

    def load(self) -> dict[str, Images]:
        """Reads the splits, each uint8 (n, C, S, S) if they fit in memory."""
        _, image_size, _ = self.image_shape
        found = self.find()
        self.digest = _digest(self.root, found)
        splits = {split: Pictures(paths, image_size, self.image_shape[0]) for split, paths in found.items()}
        num = sum(map(len, splits.values())) + self.flip * len(splits["train"])
        if num * self.num_dims > self.max_bytes:
            self.num_workers = self.loading_workers
            return splits
        quiet = bool(self.trainer) and self.trainer.global_rank > 0
        return {split: pictures.decode_all(f"reading {split} pictures", quiet) for split, pictures in splits.items()}

    def protocol(self) -> dict[str, Any]:
        """Returns what a reader must know to repeat the figures, after ``setup``."""
        return {**super().protocol(), "folder": self.root.absolute().name, "files_sha256": self.digest}


def _digest(root: Path, splits: dict[str, list[Path]]) -> str:
    """Returns what changes when a picture joins, goes, changes or comes into another split; not when the folder moves.

    Of names and sizes in bytes: to read millions of pictures once more would take as long as an epoch.
    """
    digest = hashlib.sha256()
    for split, paths in splits.items():
        files = sorted((path.relative_to(root).as_posix(), _stat(path).st_size) for path in paths)
        digest.update(repr((split, files)).encode())
    return digest.hexdigest()


def _file(path: Path) -> tuple[int, int]:
    """Returns what all names of one file share."""
    stat = _stat(path)
    return stat.st_dev, stat.st_ino


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError:  # a link whose file is gone
        raise _unreadable(path) from None


def _unreadable(path: Path) -> UnreadablePictureError:
    return UnreadablePictureError(f"image_folder: {path} cannot be read; repair it or take it away")


def _pictures(folder: Path) -> list[Path]:
    paths, seen = [], set()
    for base, folders, names in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(base)) in seen:  # links may lead round in a circle
            folders.clear()
            continue
        seen.add(place)
        folders.sort()  # of two links to one folder the same one is followed on every file system
        paths += [Path(base, name) for name in names]
    # names that begin with a dot are a file system's own notes, such as ._cat.jpg
    return sorted(path for path in paths if path.suffix.lower() in FORMATS and not path.name.startswith("."))
