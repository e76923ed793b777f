"""Which images make up which batch, and on which rank: one global batch, cut into contiguous rows.

Every rank works out the same global batches from (seed, epoch) and keeps its own rows of them. Whatever is drawn for a
batch is drawn for all of its rows and then cut in the same way, so N ranks together see exactly what one rank sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, SequentialSampler

from losses.checks import is_whole
from losses.draws import Rows, seeded

MOST_WORKERS = 1024  # processes of one loader


def at_least(setting: str, value: object, minimum: int, most: int | None = None) -> int:
    """Returns ``value`` if it is an integer of at least ``minimum``, and of at most ``most`` if there is such a bound.

    Raises:
        ValueError: otherwise, naming the setting.
    """
    if not is_whole(value, minimum, math.inf if most is None else most):
        bound = "" if most is None else f" and at most {most}"
        raise ValueError(f"{setting}={value}: give an integer of at least {minimum}{bound}")
    return value


class BatchRecord(NamedTuple):
    """What a data set needs to know to build one rank's part of one batch.

    Attributes:
        indices: which images, int64 (b,).
        rows: where these b images stand in the global batch.
        key: (seed, epoch, batch index), the root of all randomness in this batch.
    """

    indices: Tensor
    rows: Rows
    key: tuple[int, int, int]

    def randint(self, high: int, shape: tuple[int, ...], purpose: str) -> Tensor:
        """Draws integers 0..high-1 for the global batch and returns this rank's rows: uint8 (b, *shape)."""
        generator = seeded(*self.key, purpose)
        draws = torch.randint(high, (self.rows.total, *shape), generator=generator, dtype=torch.uint8)
        return draws[self.rows.start : self.rows.stop]


class GlobalBatchSampler(DistributedSampler[BatchRecord], SequentialSampler):
    """Yields one :class:`BatchRecord` a batch, for ``DataLoader(..., sampler=this, batch_size=None)``.

    A last, smaller batch is dealt out as evenly as it goes: no image is seen twice and none is left out, and a rank for
    which no row remains does not yield it. It is a ``DistributedSampler`` in that Lightning leaves it alone: the batches of any
    other kind would be dealt out again, each rank left with a part only of the rows that are its own. And a
    ``SequentialSampler``, as any other would be replaced where a few batches are trained on again and again.

    Args:
        num_examples: number of images in the split.
        batch_size: rows of the global batch, over all ranks.
        shuffle: whether each epoch has its own order. Without it the epoch stays 0 and every pass is the same pass.
        drop_last: whether to leave out a last batch of fewer than ``batch_size`` images, as training does.
        seed: decides the order and everything drawn for a batch.
        rank: this process.
        world_size: number of processes.
        mirror: whether each index i becomes ``num_examples`` + i, the mirror image of i, with probability 1/2.

    Raises:
        ValueError: with ``drop_last``, if the split does not fill one batch or the ranks cannot share it equally.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        mirror: bool = False,
    ) -> None:
        at_least("data.batch_size", batch_size, 1)
        if drop_last and batch_size > num_examples:
            raise ValueError(
                f"data.batch_size={batch_size} is larger than the {num_examples} training images: choose at most {num_examples}"
            )
        if drop_last and batch_size % world_size:
            raise ValueError(
                f"data.batch_size={batch_size} is the batch of all devices together and cannot be shared equally by "
                f"trainer.devices={world_size}: choose a multiple of {world_size}"
            )
        self.num_examples, self.batch_size, self.shuffle, self.drop_last = num_examples, batch_size, shuffle, drop_last
        self.seed, self.rank, self.world_size, self.mirror, self.epoch = seed, rank, world_size, mirror, 0
        self.start = 0  # the first batch of the next pass
        self.repeats = False  # whether every epoch is the first one again

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order and draws come next; Lightning calls it before each epoch."""
        self.epoch = epoch if self.shuffle and not self.repeats else 0

    def rows(self, batch_index: int) -> Rows:
        """Returns the rows of global batch ``batch_index`` that this rank holds."""
        total = min(self.batch_size, self.num_examples - batch_index * self.batch_size)
        share, rest = divmod(total, self.world_size)
        start = self.rank * share + min(self.rank, rest)
        return Rows(start, start + share + (self.rank < rest), total)

    def __len__(self) -> int:
        full, rest = divmod(self.num_examples, self.batch_size)
        return full + (not self.drop_last and rest > self.rank)

    def __iter__(self) -> Iterator[BatchRecord]:
        n = self.num_examples
        order = torch.randperm(n, generator=seeded(self.seed, self.epoch, "order")) if self.shuffle else torch.arange(n)
        if self.mirror:
            order = order + n * torch.randint(2, (n,), generator=seeded(self.seed, self.epoch, "flip"))
        for index in range(self.start, len(self)):
            first, rows = index * self.batch_size, self.rows(index)
            yield BatchRecord(order[first + rows.start : first + rows.stop], rows, (self.seed, self.epoch, index))
