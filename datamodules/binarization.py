"""Grey pictures as binary ones: a pixel of grey level k is 1 with probability k/255.

Validation and test pictures are drawn once, from ``split_seed``, under both rules, so that static and dynamic runs, and
runs of any seed, are scored on the same binary pictures. The rules differ in what they train on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.sampling import BatchRecord


class NoBinarization:
    """Leaves the 256 grey levels as they are.

    Args:
        levels: number of values that a pixel takes afterwards; it is stated for other settings to refer to.

    Raises:
        ValueError: if this rule leaves another number of levels.
    """

    name = "none"
    _levels = 256

    def __init__(self, levels: int | None = None) -> None:
        self.levels = self._levels if levels is None else levels
        if self.levels != self._levels:
            raise ValueError(f"data.binarization.levels={levels}: binarization {self.name!r} leaves {self._levels} levels")

    def once(self, images: Tensor, generator: torch.Generator, train: bool) -> Tensor:
        """Returns the split as it is kept in memory: uint8 (n, C, H, W) -> uint8 (n, C, H, W)."""
        return images

    def each_time(self, batch: Tensor, record: BatchRecord) -> Tensor:
        """Returns a training batch as the model sees it: uint8 (b, C, H, W) -> uint8 (b, C, H, W)."""
        return batch

    def scored(self, kept: Tensor, generator: torch.Generator) -> Tensor:
        """Returns kept training images as they are scored, always the same: uint8 (n, C, H, W) -> uint8 (n, C, H, W)."""
        return kept


class StaticBinarization(NoBinarization):
    """One draw, made when the data set is read, that all epochs share.

    This is the project's own draw, seeded by ``split_seed``. It is not the fixed binary MNIST of Larochelle and Murray
    (2011), so figures compare with papers that used those files only up to the difference between two draws.
    """

    name = "static"
    _levels = 2

    def once(self, images: Tensor, generator: torch.Generator, train: bool) -> Tensor:
        """Returns the drawn split, values 0 and 1: uint8 (n, C, H, W) -> uint8 (n, C, H, W)."""
        return _below(torch.randint(255, images.shape, generator=generator, dtype=torch.uint8), images)


class DynamicBinarization(StaticBinarization):
    """A new draw for every training batch of every epoch (Burda et al. 2016, section 5)."""

    name = "dynamic"

    def once(self, images: Tensor, generator: torch.Generator, train: bool) -> Tensor:
        """Returns grey training images and a drawn split otherwise: uint8 (n, C, H, W) -> uint8 (n, C, H, W)."""
        return images if train else super().once(images, generator, train)

    def each_time(self, batch: Tensor, record: BatchRecord) -> Tensor:
        """Returns the drawn batch, values 0 and 1: uint8 (b, C, H, W) -> uint8 (b, C, H, W)."""
        return _below(record.randint(255, tuple(batch.shape[1:]), "binarization"), batch)

    def scored(self, kept: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the draw that static binarisation trains on: uint8 (n, C, H, W) -> uint8 (n, C, H, W)."""
        return super().once(kept, generator, train=False)


def _below(draws: Tensor, grey: Tensor) -> Tensor:
    # of the 255 equally likely draws 0..254, grey of them are below grey: the probability is grey/255 exactly
    return (draws < grey).to(torch.uint8)
