"""Data that memory does not hold: shards on disk, read in an order that is random and yet mostly sequential.

The training images are cut into blocks of ``block_size`` that lie together on disk. An epoch shuffles the blocks, and the
images within each, and writes them all in one line. The line is cut into as many equal lanes as a global batch has rows: row
r of batch i is the i-th image of lane r. So a batch takes its rows from blocks all over the set, a block is used up within
``block_size`` batches by one row, hence by one rank, unless a lane's end cuts it in two, and every rank reads its own lanes
and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import ImageBatches, ImageDataModule, shuffled
from datamodules.sampling import MOST_WORKERS, BatchRecord, GlobalBatchSampler, at_least
from datamodules.shards import Manifest, ShardedImages
from losses.draws import seeded

MOST_IN_BLOCK = 2**24  # an order is drawn for a whole block at once
MOST_AHEAD = 10_000  # batches that each worker is asked for before the first one comes


class BlockSampler(GlobalBatchSampler):
    """Deals out training images block by block, as the head of this module says; in memory it keeps 8 bytes an image.

    Args:
        num_examples: number of training images.
        batch_size: rows of the global batch, over all ranks.
        block_size: images in a block; with 1, every order of the images is equally likely.
        seed: decides the order and everything drawn for a batch.
        rank: this process.
        world_size: number of processes.
        mirror: whether each index i becomes ``num_examples`` + i, the mirror image of i, with probability 1/2.
    """

    def __init__(
        self, num_examples: int, batch_size: int, block_size: int, seed: int, rank: int, world_size: int, mirror: bool
    ) -> None:
        super().__init__(num_examples, batch_size, True, True, seed, rank, world_size, mirror)
        self.block_size = block_size

    def lanes(self) -> Tensor:
        """Returns which image is at which place of which lane: int64 (batch size, batches)."""
        generator = seeded(self.seed, self.epoch, "order")
        n, size = self.num_examples, self.block_size
        line, end = torch.empty(n, dtype=torch.int64), 0
        for some in torch.randperm(-(-n // size), generator=generator).split(4096):  # so that memory holds few keys
            keys = torch.rand(len(some), size, generator=generator)
            images = (some[:, None] * size + keys.argsort(1)).flatten()
            images = images[images < n]  # the last block may be a smaller one
            line[end : end + len(images)] = images
            end += len(images)
        batches = n // self.batch_size
        return line[: self.batch_size * batches].view(self.batch_size, batches)

    def __iter__(self) -> Iterator[BatchRecord]:
        lanes = self.lanes()
        for index in range(self.start, len(self)):
            rows, key = self.rows(index), (self.seed, self.epoch, index)
            images = lanes[rows.start : rows.stop, index]
            if self.mirror:
                flips = torch.randint(2, (rows.total,), generator=seeded(*key, "flip"))
                images = images + self.num_examples * flips[rows.start : rows.stop]
            yield BatchRecord(images, rows, key)


class BlockBatches(ImageBatches):
    """Turns one record of a :class:`BlockSampler` into one batch, and has each block fetched when its first image is needed.

    Args:
        images: the split.
        block_size: images in a block.
    """

    def __init__(self, images: ShardedImages, block_size: int) -> None:
        super().__init__(images)
        self.block_size, self.blocks = block_size, set()

    def __getitem__(self, record: BatchRecord) -> Tensor:
        """Returns the images of a record: (b, C, H, W)."""
        n = len(self.images)
        blocks = set((record.indices % n // self.block_size).tolist())
        for block in blocks - self.blocks if self.block_size > 1 else ():
            self.images.read_ahead(block * self.block_size, min(n, (block + 1) * self.block_size))
        self.blocks = blocks
        return super().__getitem__(record)


class StreamDataModule(ImageDataModule):
    """A set of shards that ``prepare.py`` has written.

    Args:
        root: its folder.
        horizontal_flip: whether training images are mirrored with probability 1/2.
        num_val: number of training images held out for validation, if the set has no shards of validation images.
        num_test: the same for the test.
        block_size: images that are read together and stay close in the order; 1 shuffles perfectly, and reads at random.
        num_workers: processes that read; the order does not depend on it.
        prefetch: batches that each of them holds ready.
        verify: whether to read everything once and compare checksums, before anything else.
        shared: the settings of :class:`ImageDataModule`.

    Raises:
        ValueError: if a setting is out of range.
    """

    name = "stream"

    def __init__(
        self,
        root: str,
        horizontal_flip: bool = False,
        num_val: int = 5000,
        num_test: int = 5000,
        block_size: int = 64,
        num_workers: int = 1,
        prefetch: int = 4,
        verify: bool = False,
        **shared: Any,
    ) -> None:
        # what the set really has is known when its manifest is read
        actual = {"actual_shape": shared["image_shape"], "actual_levels": shared["levels"]}
        super().__init__(**shared, **actual, flip=horizontal_flip)
        self.root, self.verify = Path(root).expanduser(), verify
        self.held_out = {"val": at_least("data.num_val", num_val, 1), "test": at_least("data.num_test", num_test, 1)}
        self.block_size = at_least("data.block_size", block_size, 1, MOST_IN_BLOCK)
        self.num_workers = at_least("data.num_workers", num_workers, 0, MOST_WORKERS)
        self.prefetch = at_least("data.prefetch", prefetch, 1, MOST_AHEAD)

    def prepare_data(self) -> None:
        """Compares checksums, if that is wished for; Lightning calls it on one rank of each node, more than once."""
        if self.verify:
            manifest = Manifest.read(self.root)
            for shards in manifest.splits.values():
                ShardedImages(self.root, shards, manifest.image_shape).verify()
            self.verify = False

    def load(self) -> dict[str, ShardedImages]:
        """Opens the splits; images that have no shards of their own are cut, by ``split_seed``, from the training images.

        Raises:
            DamagedShardsError: if a file is missing or damaged.
            ValueError: if the set is of another shape than stated, or too small.
        """
        self.manifest = Manifest.read(self.root)
        self.name = self.manifest.name
        self._expect("image_shape", list(self.image_shape), list(self.manifest.image_shape), "set it to that")
        self._expect("levels", self.levels, self.manifest.levels, "set it to that")
        rows = dict.fromkeys(self.manifest.splits) | self._hold_out()
        return {
            split: ShardedImages(
                self.root, self.manifest.splits.get(split, self.manifest.splits["train"]), self.image_shape, of
            )
            for split, of in rows.items()
        }

    def _hold_out(self) -> dict[str, Tensor]:
        """Returns which rows of the training files each split has, of the splits that share them."""
        num, missing = self.manifest.num("train"), [split for split in self.held_out if split not in self.manifest.splits]
        if not missing:
            return {}
        if sum(self.held_out[split] for split in missing) >= num:
            wished = " and ".join(f"data.num_{split}={self.held_out[split]}" for split in missing)
            raise ValueError(f"{wished}: {self.name} has only {num} training images; hold out fewer")
        order, rows = shuffled(num, self.split_seed), {}
        for split in missing:
            rows[split], order = order[: self.held_out[split]], order[self.held_out[split] :]
        # in the order of the files, so that images that lie together stay together
        return {split: of.sort().values for split, of in (rows | {"train": order}).items()}

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Returns full batches in an order of their own for each epoch."""
        return self._loader(BlockBatches(self.splits["train"], self.block_size), "train")

    def _sampler(self, split: str) -> GlobalBatchSampler:
        if split != "train":
            return super()._sampler(split)
        return BlockSampler(self.sizes[split], self.batch_size, self.block_size, self.seed, *self._ranks(), self.flip)

    def protocol(self) -> dict[str, Any]:
        """Returns what a reader must know to repeat the figures, after ``setup``."""
        return {**super().protocol(), "images_sha256": self.manifest.digest()}
