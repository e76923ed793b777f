"""Rows of an evaluation: every image a number of times, each row with randomness of its own.

What a row draws follows from (seed, purpose, image, replicate) alone. So a figure is the same, to rounding, however rows are
cut into batches and dealt out to devices (of the probability flow to its solver's tolerance, whose steps suit a batch as a
whole), and the same digits come back when it is worked out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from lightning.fabric import Fabric
from torch import Tensor

from datamodules.base import Images
from losses.draws import Own, mix, own_generators, seeded

LARGEST_GROUP = 8  # images that share one low-discrepancy set of steps
LEAST_GROUPS = 32  # independent groups, as far as there are images: the noise's standard error has as many degrees of freedom
LEAST_REPLICATES = 2  # of each image: from one, the noise cannot be read off


@dataclass(frozen=True, eq=False)
class Rows:
    """``replicates`` rows for each image, images in a random order so that any first part of them is a fair sample.

    Attributes:
        images: the split.
        order: indices of the images to evaluate, (N,).
        replicates: R rows for each image, next to each other.
        seed: of the evaluation.
        purpose: rows of different purposes share no randomness.
    """

    images: Images
    order: Tensor
    replicates: int
    seed: int
    purpose: str

    @classmethod
    def of_split(cls, images: Images, num: int, replicates: int, seed: int, purpose: str) -> Rows:
        """Takes the first ``num`` images of the evaluation's order."""
        order = torch.randperm(len(images), generator=seeded(seed, "images"))[:num]
        return cls(images, order, replicates, seed, purpose)

    def __len__(self) -> int:
        return len(self.order) * self.replicates

    @property
    def _group_size(self) -> int:
        return max(1, min(LARGEST_GROUP, len(self.order) // LEAST_GROUPS))

    @property
    def groups(self) -> Tensor:
        """Which group each image belongs to: (N,). Groups are independent of each other."""
        return torch.arange(len(self.order)) // self._group_size

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Own]:
        """Returns the images of some rows, (b, C, H, W), and their randomness."""
        places, replicates = zip(*(divmod(row, self.replicates) for row in rows), strict=True)
        images = self.order[list(places)]
        keys = zip(images.tolist(), replicates, strict=True)
        generators = [seeded(self.seed, self.purpose, image, replicate) for image, replicate in keys]
        return self._select(images), Own(generators, partial(self._cells, places, replicates))

    def _select(self, images: Tensor) -> Tensor:
        """Returns images by index, (b,) -> (b, C, H, W), each asked for once: it may be decoded whenever it is."""
        few, back = images.unique(return_inverse=True)
        if len(few) == len(images):
            return self.images.index_select(0, images)
        return self.images.index_select(0, few).index_select(0, back)

    def _cells(self, places: Sequence[int], replicates: Sequence[int]) -> Tensor:
        size, num, cells = self._group_size, len(self.order), []
        for place, replicate in zip(places, replicates, strict=True):
            group, cell = divmod(place, size)
            shift = mix(self.seed, self.purpose, "shift", group, replicate) / 2**63
            cells.append((shift + cell / min(size, num - size * group)) % 1.0)  # the last group may be smaller
        return torch.tensor(cells, dtype=torch.float64).clamp(max=1 - 1e-12)


def over_batches(
    rows: Rows,
    function: Callable[[Tensor], Tensor],
    fabric: Fabric,
    batch_size: int,
    done: Callable[[int], None],
    share: bool = True,
    at_once: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (row numbers (b,), ``function``'s values of these rows, (b, *) float64 on the CPU): this rank's share.

    Args:
        rows: what is evaluated.
        function: images (b, C, H, W) -> (b, *).
        fabric: says which rank this is, on which device and in which precision.
        batch_size: rows at once.
        done: told how many rows were finished, over all ranks as far as this one can know.
        share: whether ranks share the rows, each image on one of them; otherwise every rank takes them all.
        at_once: replicates of an image before the next image has its turn; ``None`` is all of them.
    """
    rank, ranks = (fabric.global_rank, fabric.world_size) if share else (0, 1)
    count = rows.replicates
    turns = (range(count)[first : first + (at_once or count)] for first in range(0, count, at_once or count))
    # one after the other: a list of them would grow with the replicates
    mine = (image * count + k for turn in turns for image in range(rank, len(rows.order), ranks) for k in turn)
    while numbers := list(islice(mine, batch_size)):
        x, own = rows.batch(numbers)
        with torch.inference_mode(), fabric.autocast(), own_generators(own):
            values = function(x.to(fabric.device))
        yield torch.tensor(numbers), values.cpu().double()
        done(len(numbers) * ranks)


def gather(
    rows: Rows,
    function: Callable[[Tensor], Tensor],
    width: int,
    fabric: Fabric,
    batch_size: int,
    done: Callable[[int], None] = lambda _: None,
    partial: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns (values (N, R, width) float64, which images count where Ctrl-C cut it short: bool (N,), else none).

    Every image has two replicates before any has more, so what Ctrl-C leaves is of all images as soon as it can be, with as
    many replicates as each of them has: R is then smaller.

    Args:
        rows: what is evaluated.
        function: images (b, C, H, W) -> (b, width).
        width: numbers for each row.
        fabric: see :func:`over_batches`.
        batch_size: rows at once.
        done: see :func:`over_batches`.
        partial: returns what was finished after Ctrl-C, instead of passing the interrupt on. Images of other ranks do not
            count, which cannot be asked any more.
    """
    values = torch.full((len(rows), width), torch.nan, dtype=torch.float64)
    computed = torch.zeros(len(rows), dtype=torch.bool)
    try:
        for numbers, found in over_batches(rows, function, fabric, batch_size, done, at_once=LEAST_REPLICATES):
            values[numbers], computed[numbers] = found, True
    except KeyboardInterrupt:
        if not partial:
            raise
        counts = computed.view(len(rows.order), rows.replicates).sum(1)
        of_all = min(counts[counts > 0].tolist(), default=0)
        common = max(of_all, min(LEAST_REPLICATES, rows.replicates))
        return values.view(len(rows.order), rows.replicates, width)[:, :common], counts >= common
    if fabric.world_size > 1:
        # every row was computed on one rank
        values = fabric.all_reduce(torch.where(computed[:, None], values, 0.0), reduce_op="sum").cpu()
    return values.view(len(rows.order), rows.replicates, width), None
