"""Data sets that come as known files: MNIST, Fashion-MNIST, CIFAR-10 and SVHN.

Files are looked for where torchvision puts them below ``root``, then in ``root`` itself. Files that are there are read as
they are, whatever their checksum: a subset or a re-packed copy is as good as the original if its layout is right. Only
what is missing is downloaded, by torchvision, which does verify the checksum.
"""

from __future__ import annotations

import gzip
import pickle
import socket
import struct
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from filelock import FileLock
from torch import Tensor
from torchvision import datasets

from datamodules.base import ImageDataModule, shuffled
from datamodules.binarization import NoBinarization
from datamodules.sampling import at_least

TIMEOUT = 10.0  # seconds without an answer after which a download is given up


class MissingDataError(FileNotFoundError):
    """Files of a data set are not there and could not be downloaded; the message is one sentence."""


class FileDataModule(ImageDataModule):
    """A data set of training and test files; the validation images are held out from the training files.

    Args:
        root: folder of data sets, or the folder of the files themselves.
        download: whether to download files that are missing.
        num_val: number of training images held out for validation.
        shared: the settings of :class:`ImageDataModule`.

    Raises:
        ValueError: if a setting is out of range.
    """

    folder: ClassVar[str]  # where torchvision puts the files, below root
    train_files: ClassVar[tuple[str, ...]]
    test_files: ClassVar[tuple[str, ...]]
    suffixes: ClassVar[tuple[str, ...]] = ("",)  # endings a file may have beside its name

    def __init__(self, root: str, download: bool = True, num_val: int = 5000, **shared: Any) -> None:
        super().__init__(**shared)
        self.root, self.download = Path(root).expanduser(), download
        self.num_val = at_least("data.num_val", num_val, 1)

    @abstractmethod
    def read(self, path: Path) -> Tensor:
        """Reads one file: uint8 (n, C, H, W)."""

    @abstractmethod
    def fetch(self) -> None:
        """Downloads the files to ``root / folder``."""

    def prepare_data(self) -> None:
        """Downloads the files if they are missing; of ranks that begin together one does, and the others wait for it."""
        if not self._look()[1]:
            return
        if not self.download:
            raise self._missing("or set data.root to where they are, or data.download=true")
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(TIMEOUT)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / f".{self.name}.lock"):
                if self._look()[1]:
                    self.fetch()
        except (OSError, RuntimeError) as error:
            raise self._missing(f"or set data.root to where they are, since the download failed: {_reason(error)}") from None
        finally:
            socket.setdefaulttimeout(timeout)

    def load(self) -> dict[str, Tensor]:
        """Reads the splits, each uint8 (n, C, H, W), once they are there: this may be a rank that prepares nothing."""
        self.prepare_data()
        folder, missing = self._look()
        if missing:
            raise self._missing("or set data.root to where they are")
        train, test = (self._read_all(folder, names) for names in (self.train_files, self.test_files))
        if self.num_val >= len(train):
            raise ValueError(f"data.num_val={self.num_val}: {self.name} has only {len(train)} training images; hold out fewer")
        order = shuffled(len(train), self.split_seed)
        return {"train": train[order[: -self.num_val]], "val": train[order[-self.num_val :]], "test": test}

    def _read_all(self, folder: Path, names: tuple[str, ...]) -> Tensor:
        parts = []
        for name in names:
            path = self._file(folder, name)
            try:
                parts.append(self.read(path))
                if parts[-1].dtype != torch.uint8 or parts[-1].shape[1:] != self.image_shape:
                    raise ValueError(f"it has {parts[-1].dtype} images of shape {list(parts[-1].shape[1:])}")
            except Exception as error:  # a damaged pickle can raise anything
                raise ValueError(
                    f"{self.name}: {path} is damaged or is another kind of file ({_reason(error)}); "
                    "delete it and run again with data.download=true, or put a good copy in its place"
                ) from None
        return torch.cat(parts)

    def _file(self, folder: Path, name: str) -> Path | None:
        paths = (folder / f"{name}{suffix}" for suffix in self.suffixes)
        return next((path for path in paths if path.is_file()), None)

    def _look(self) -> tuple[Path, list[str]]:
        """Returns the folder that has most of the files, and the names of those that it does not have."""
        names = self.train_files + self.test_files
        folders = (self.root / self.folder, self.root)
        found = [(folder, [name for name in names if self._file(folder, name) is None]) for folder in folders]
        return min(found, key=lambda look: len(look[1]))

    def _missing(self, advice: str) -> MissingDataError:
        folder, names = self._look()
        files = ", ".join(name + self.suffixes[-1] for name in names)
        return MissingDataError(f"{self.name}: put the missing {files} into {folder.absolute()}, {advice}")


class MNISTDataModule(FileDataModule):
    """MNIST (LeCun et al. 1998): 60,000 and 10,000 handwritten digits of 28x28, from idx files, compressed or not.

    Args:
        binarization: how the grey levels become bits.
        shared: the settings of :class:`FileDataModule`.
    """

    name = "mnist"
    folder = "MNIST/raw"
    train_files, test_files = ("train-images-idx3-ubyte",), ("t10k-images-idx3-ubyte",)
    suffixes = ("", ".gz")

    def __init__(self, binarization: NoBinarization, **shared: Any) -> None:
        actual = {"actual_shape": (1, 28, 28), "actual_levels": binarization.levels}
        super().__init__(**shared, **actual, binarization=binarization)

    def read(self, path: Path) -> Tensor:
        """Reads an idx file of images, by itself because torchvision does not read compressed ones: uint8 (n, 1, H, W)."""
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = bytearray(file.read())
        magic, num, height, width = struct.unpack(">4I", data[:16])
        if magic != 0x00000803:
            raise ValueError("it is not an idx file of images")
        return torch.frombuffer(data, dtype=torch.uint8, offset=16).view(num, 1, height, width)

    def fetch(self) -> None:
        """Downloads the files to ``root / folder``."""
        datasets.MNIST(self.root, download=True)


class FashionMNISTDataModule(MNISTDataModule):
    """Fashion-MNIST (Xiao et al. 2017): 60,000 and 10,000 pictures of clothes, in files named like those of MNIST."""

    name = "fashion_mnist"
    folder = "FashionMNIST/raw"

    def fetch(self) -> None:
        """Downloads the files to ``root / folder``."""
        datasets.FashionMNIST(self.root, download=True)


class _Arrays(pickle.Unpickler):
    """Reads pickles of numbers, texts and arrays and nothing else, since files are read without a known checksum."""

    def find_class(self, module: str, name: str) -> Any:
        names = ("_reconstruct", "_frombuffer", "ndarray", "dtype", "encode")
        if module.split(".")[0] in ("numpy", "_codecs") and name in names:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")


class CIFAR10DataModule(FileDataModule):
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 colour photographs of 32x32, from the Python version's files.

    Args:
        horizontal_flip: whether training images are mirrored with probability 1/2.
        shared: the settings of :class:`FileDataModule`.
    """

    name = "cifar10"
    folder = "cifar-10-batches-py"
    train_files, test_files = tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)

    def __init__(self, horizontal_flip: bool = False, **shared: Any) -> None:
        super().__init__(**shared, actual_shape=(3, 32, 32), actual_levels=256, flip=horizontal_flip)

    def read(self, path: Path) -> Tensor:
        """Reads a pickled batch: uint8 (n, 3, 32, 32)."""
        with path.open("rb") as file:
            data = _Arrays(file, encoding="latin1").load()["data"]
        if data.shape[1:] != (3072,):
            raise ValueError(f"data of shape {data.shape} is not one row of 3072 numbers for each photograph")
        return torch.from_numpy(data).view(-1, 3, 32, 32)

    def fetch(self) -> None:
        """Downloads the files to ``root / folder``."""
        datasets.CIFAR10(self.root, download=True)


class _UncheckedSVHN(datasets.SVHN):
    def _check_integrity(self) -> bool:
        return True


class SVHNDataModule(FileDataModule):
    """Street View House Numbers (Netzer et al. 2011), cropped digits: 73,257 and 26,032 colour photographs of 32x32.

    Args:
        shared: the settings of :class:`FileDataModule`.
    """

    name = "svhn"
    folder = "SVHN"
    train_files, test_files = ("train_32x32.mat",), ("test_32x32.mat",)

    def __init__(self, **shared: Any) -> None:
        super().__init__(**shared, actual_shape=(3, 32, 32), actual_levels=256)

    def read(self, path: Path) -> Tensor:
        """Reads a MATLAB file through torchvision: uint8 (n, 3, 32, 32)."""
        return torch.from_numpy(_UncheckedSVHN(path.parent, split=path.name.split("_")[0]).data).contiguous()

    def fetch(self) -> None:
        """Downloads the files to ``root / folder``."""
        for split in ("train", "test"):
            datasets.SVHN(self.root / self.folder, split=split, download=True)


def _reason(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[-1]
