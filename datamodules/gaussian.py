"""Continuous data whose every answer is known in closed form: x ~ N(0, std²), independently in each dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from datamodules.base import ImageDataModule
from datamodules.sampling import at_least
from losses.draws import seeded


class GaussianDataModule(ImageDataModule):
    """Draws of N(0, std²), float32. The best bound any model can reach is minus the entropy, -½ ln(2πe std²) nats a dimension.

    Args:
        image_shape: (C, H, W).
        std: standard deviation of each dimension.
        num_train: number of training images.
        num_val: number of validation images.
        num_test: number of test images.
        shared: the other settings of :class:`ImageDataModule`; ``split_seed`` decides the draws.

    Raises:
        ValueError: if a setting is out of range.
    """

    name = "gaussian"

    def __init__(
        self, image_shape: Sequence[int], std: float, num_train: int, num_val: int, num_test: int, **shared: Any
    ) -> None:
        if len(image_shape) != 3 or not all(isinstance(size, int) and size > 0 for size in image_shape):
            raise ValueError(f"data.image_shape={list(image_shape)}: give three positive integers, channels, height and width")
        if not 0 < std < math.inf:
            raise ValueError(f"data.std={std}: give a positive number")
        super().__init__(image_shape, **shared, actual_shape=image_shape, actual_levels=None)
        numbers = {"train": num_train, "val": num_val, "test": num_test}
        self.std, self.numbers = std, {split: at_least(f"data.num_{split}", num, 1) for split, num in numbers.items()}

    def load(self) -> dict[str, Tensor]:
        """Draws the splits, each float32 (n, C, H, W).

        Raises:
            ValueError: if memory does not hold one.
        """
        return {split: self._draw(split, num) for split, num in self.numbers.items()}

    def _draw(self, split: str, num: int) -> Tensor:
        generator = seeded(self.split_seed, "gaussian", split)
        try:
            return self.std * torch.randn((num, *self.image_shape), generator=generator)
        except (RuntimeError, TypeError):  # of a number that torch cannot hold
            raise ValueError(
                f"data.num_{split}={num}: memory does not hold so many images of {list(self.image_shape)}; draw fewer"
            ) from None

    def describe(self) -> str:
        """Returns one line about the data, after ``setup``, and the figure that no model can be expected to fall below."""
        entropy = 0.5 * self.num_dims * math.log(2 * math.pi * math.e * self.std**2)
        return f"{super().describe()}; -ELBO is at best {entropy:.2f} nats"

    def protocol(self) -> dict[str, Any]:
        """Returns what a reader must know to repeat the figures, after ``setup``."""
        return {**super().protocol(), "std": self.std}
