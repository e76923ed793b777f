"""What all data modules share: resident splits, loaders that gather whole batches, and the account given of them.

A split that fits in memory is one uint8 tensor, and a batch is one ``index_select``. Two seeds keep two things apart:
``split_seed`` decides what the data set is (which images are held out, how they are binarised), ``seed`` decides how a
run walks through it (order, flips, what is redrawn for training). Runs of different seeds are scored on the same images.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from lightning import LightningDataModule
from lightning.pytorch.accelerators import CUDAAccelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.binarization import NoBinarization
from datamodules.sampling import BatchRecord, GlobalBatchSampler, at_least
from losses.draws import seeded

MIRRORED_AT_ONCE = 1024  # images


class Images(Protocol):
    """Images by index: a tensor (n, C, H, W), or pictures that are decoded when they are asked for.

    If training images are to be mirrored, index n + i is image i mirrored.
    """

    def __len__(self) -> int: ...

    def index_select(self, dim: int, index: Tensor, /) -> Tensor:
        """Returns the images of ``index`` (b,) as a tensor (b, C, H, W); ``dim`` is 0."""
        ...


class ImageBatches(Dataset[Tensor]):
    """Turns one record into one batch.

    Args:
        images: the split.
        binarization: what is redrawn for each batch, if anything.
    """

    def __init__(self, images: Images, binarization: NoBinarization | None = None) -> None:
        self.images, self.binarization = images, binarization

    def __getitem__(self, record: BatchRecord) -> Tensor:
        """Returns the images of a record: (b, C, H, W)."""
        batch = self.images.index_select(0, record.indices)
        return batch if self.binarization is None else self.binarization.each_time(batch, record)


class ImageLoader(DataLoader[Tensor]):
    """A loader that says in one sentence that a worker has been lost."""

    def __iter__(self) -> Iterator[Tensor]:
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise LostWorkerError(
                "a process that reads images was killed, as the system does where memory runs out: set data.num_workers lower, "
                "0 for none"
            ) from None


class ResumableLoader(ImageLoader):
    """A loader that goes on in the middle of an epoch, reading nothing of what came before.

    Lightning counts the batches of an epoch itself and saves the count, so the loader asks it for its place and keeps none
    of its own. It asks with the first batch: Lightning takes the iterator before it says which epoch it is.

    Args:
        place: returns how many batches of this epoch were trained on.
        settings: those of ``DataLoader``; the sampler is a :class:`GlobalBatchSampler`.
    """

    def __init__(self, *args: Any, place: Callable[[], int], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.place = place

    def __iter__(self) -> Iterator[Tensor]:
        self.sampler.start = self.place()
        if self.num_workers or self.pin_memory:
            yield from super().__iter__()
        else:  # the same, without what PyTorch does around it for workers and for single examples
            yield from map(self.dataset.__getitem__, self.sampler)

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: with this method, Lightning knows that the loader can be resumed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Needs nothing of what was saved."""


class DamagedDataError(ValueError):
    """Images cannot be read; the message is one sentence, also when a loader's worker passes it on."""

    def __init__(self, message: str) -> None:
        # DataLoader raises a worker's error again with the traceback in its message, of which the last line is ours
        super().__init__(message.strip().splitlines()[-1].split(f"{type(self).__name__}: ")[-1])


class LostWorkerError(DamagedDataError):
    """A loader's worker has ended, and not because it was told to."""


class ImageDataModule(LightningDataModule, ABC):
    """Batches without labels: uint8 (b, C, H, W) with values 0..levels-1, or float32 if the data is continuous.

    Args:
        image_shape: (C, H, W) as the configuration states it, for the model to refer to.
        levels: number of values a pixel takes, as the configuration states it; ``None`` for continuous data.
        batch_size: images in the global batch, over all ranks.
        seed: decides order, flips and what is redrawn in training.
        split_seed: decides which images are held out and how held out images are binarised.
        actual_shape: the shape that the data really has.
        actual_levels: the levels that the data really has.
        flip: whether training images are mirrored left to right with probability 1/2.
        binarization: how grey levels become bits.

    Raises:
        ValueError: if a setting is out of range, or what is stated is not what the data has.
    """

    name: str

    def __init__(
        self,
        image_shape: Sequence[int],
        levels: int | None,
        batch_size: int,
        seed: int,
        split_seed: int = 0,
        *,
        actual_shape: Sequence[int],
        actual_levels: int | None,
        flip: bool = False,
        binarization: NoBinarization | None = None,
    ) -> None:
        super().__init__()
        self.image_shape, self.levels = tuple(image_shape), levels
        self._expect("image_shape", list(image_shape), list(actual_shape))
        self._expect("levels", levels, actual_levels)
        self.batch_size = at_least("data.batch_size", batch_size, 1)
        self.seed = at_least("data.seed", seed, 0)
        self.split_seed = at_least("data.split_seed", split_seed, 0, 2**32 - 1)  # scikit-learn's
        self.flip, self.binarization = flip, binarization or NoBinarization()
        if self.binarization.name != "none" and actual_levels != self.binarization.levels:
            raise ValueError(
                f"data.binarization={self.binarization.name}: {self.name} has no grey levels of 0..255 to make binary"
            )
        self.num_workers = 0  # a resident split is gathered faster than another process could hand it over
        self.prefetch = 2  # batches that each worker holds ready
        self.splits: dict[str, Images] = {}
        self.sizes: dict[str, int] = {}

    def _expect(self, setting: str, stated: object, actual: object, advice: str = "set it to that or leave it alone") -> None:
        if stated != actual:
            raise ValueError(f"data.{setting}={stated}: {self.name} has {setting}={actual}, so {advice}")

    @abstractmethod
    def load(self) -> Mapping[str, Images]:
        """Reads the splits ``train``, ``val`` and ``test``, each (n, C, H, W)."""

    def setup(self, stage: str | None = None) -> None:
        """Reads all splits, once."""
        if self.splits:
            return
        splits = dict(self.load())
        self.sizes = {split: len(images) for split, images in splits.items()}
        for split in splits:
            if isinstance(splits[split], Tensor):
                splits[split] = self.binarization.once(splits[split], self._bits(split), split == "train")
        if self.flip and isinstance(splits["train"], Tensor):
            add_mirror_images(splits)
        self.splits = splits

    def _bits(self, split: str) -> torch.Generator:
        return seeded(self.split_seed, "binarization", split)

    def scored(self, split: str) -> Images:
        """Returns the images of a split as a model is scored on them, after ``setup``: each once, and the same each time.

        What training keeps beside them, mirror images and grey levels to draw bits from, is left out.
        """
        images = self._images(split)
        if not isinstance(images, Tensor):
            return images
        images = images[: self.sizes[split]]
        return self.binarization.scored(images, self._bits(split)) if split == "train" else images

    def _images(self, split: str) -> Images:
        if not self.splits:
            raise RuntimeError(f"{self.name} has not been read: call prepare_data() and setup() first, as a Trainer does")
        return self.splits[split]

    def check_ranks(self, num: int) -> None:
        """Refuses what ``num`` ranks cannot share, after ``setup``.

        Raises:
            ValueError: if a rank would get no rows of a batch, or no image of a split.
        """
        GlobalBatchSampler(self.sizes["train"], self.batch_size, True, True, self.seed, 0, num)
        for split in ("val", "test"):
            if self.sizes[split] < num:
                raise ValueError(
                    f"trainer.devices: the {self.sizes[split]} {split} images of {self.name} are fewer than {num} devices: use "
                    f"{self.sizes[split]}, or hold more images out"
                )

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Returns full batches in an order of their own for each epoch."""
        return self._loader(ImageBatches(self._images("train"), self.binarization), "train")

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Returns every validation image once, the same in every pass."""
        return self._loader(ImageBatches(self._images("val")), "val")

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Returns every test image once, the same in every pass."""
        return self._loader(ImageBatches(self._images("test")), "test")

    def _loader(self, batches: ImageBatches, split: str) -> DataLoader[Tensor]:
        workers = self.num_workers
        settings: dict[str, Any] = {"batch_size": None, "num_workers": workers, "persistent_workers": workers > 0}
        if workers:
            settings |= {"prefetch_factor": self.prefetch, "worker_init_fn": end_with_the_run}
            settings["multiprocessing_context"] = worker_context()
        # a GPU copies from pinned memory while the host goes on, which Lightning asks it to
        settings["pin_memory"] = isinstance(getattr(self.trainer, "accelerator", None), CUDAAccelerator)
        sampler = self._sampler(split)
        sampler.repeats = bool(getattr(self.trainer, "overfit_batches", 0))
        if split == "train":
            return ResumableLoader(batches, sampler=sampler, place=self._place, **settings)
        return ImageLoader(batches, sampler=sampler, **settings)

    def _sampler(self, split: str) -> GlobalBatchSampler:
        train = split == "train"
        mirror = train and self.flip
        return GlobalBatchSampler(self.sizes[split], self.batch_size, train, train, self.seed, *self._ranks(), mirror=mirror)

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _place(self) -> int:
        return self.trainer.fit_loop.batch_idx + 1 if getattr(self.trainer, "training", False) else 0

    @property
    def num_dims(self) -> int:
        """Numbers in one image, C·H·W: what bits/dim divides by."""
        return math.prod(self.image_shape)

    @property
    def continuous(self) -> bool:
        """Whether values are real numbers rather than levels."""
        return self.levels is None

    def describe(self) -> str:
        """Returns one line about the data, after ``setup``."""
        sizes = "/".join(str(self.sizes[split]) for split in ("train", "val", "test"))
        values = "continuous values" if self.continuous else f"{self.levels} levels"
        binarized = "" if self.binarization.name == "none" else f" ({self.binarization.name} binarisation)"
        return f"{self.name}: {sizes} images of {'x'.join(map(str, self.image_shape))}, {values}{binarized}"

    def protocol(self) -> dict[str, Any]:
        """Returns what a reader must know to repeat the figures, after ``setup``."""
        return {
            "dataset": self.name,
            "image_shape": list(self.image_shape),
            "levels": self.levels,
            **{f"num_{split}": size for split, size in self.sizes.items()},
            "binarization": self.binarization.name,
            "split_seed": self.split_seed,
        }

    def fingerprint(self) -> dict[str, Any]:
        """Returns what tells these images and splits from others under the same settings, after ``setup``."""
        return {key: value for key, value in self.protocol().items() if key.startswith("num_") or key.endswith("sha256")}


def add_mirror_images(splits: dict[str, Images]) -> None:
    """Lays mirror images ready behind those of ``train``: flipping a gathered batch costs several times the gather.

    What was there is let go of first, so no more memory is taken than the result has, if nothing else holds it.
    """
    train = splits["train"]
    num = len(train)
    splits["train"] = both = train.new_empty((2 * num, *train.shape[1:]))
    both[:num] = train
    del train
    for images, mirrored in zip(both[:num].split(MIRRORED_AT_ONCE), both[num:].split(MIRRORED_AT_ONCE), strict=True):
        mirrored.copy_(images.flip(-1))


def worker_context() -> str:
    """Returns how a loader's processes begin: from a process without threads.

    A copy of this one (fork) that is made while a thread of the communication between ranks holds a lock waits for ever.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.get_context("forkserver").set_forkserver_preload(["datamodules"])  # imported once, for all of them
    return "forkserver"


def end_with_the_run(worker: int) -> None:
    """Lets go of the pipe by which the process that workers begin from knows that the run is alive.

    It ends with the run then, however that ends, and PyTorch has a worker end when what it began from has ended.
    """
    module = sys.modules.get("multiprocessing.forkserver")  # not there where workers are spawned
    server = getattr(module, "_forkserver", None)
    if getattr(server, "_forkserver_alive_fd", None) is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None


def shuffled(num: int, seed: int) -> Tensor:
    """Returns the indices 0..num-1 in the order that splits are cut from: int64 (num,)."""
    return torch.randperm(num, generator=seeded(seed, "split"))
