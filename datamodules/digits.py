"""The 1797 handwritten digits of scikit-learn, 8x8 with 17 levels: real data that comes with an installed package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datamodules.base import ImageDataModule, shuffled


class DigitsDataModule(ImageDataModule):
    """Optical recognition of handwritten digits (Alpaydin and Kaynak 1998), split into 1437, 180 and 180 images.

    Args:
        shared: the settings of :class:`ImageDataModule`.
    """

    name = "digits"

    def __init__(self, **shared: Any) -> None:
        super().__init__(**shared, actual_shape=(1, 8, 8), actual_levels=17)

    def load(self) -> dict[str, Tensor]:
        """Reads the splits, each uint8 (n, 1, 8, 8)."""
        from sklearn.datasets import load_digits  # here, because scikit-learn is slow to import and no other data set needs it

        images = torch.from_numpy(load_digits().images).to(torch.uint8).unsqueeze(1)
        parts = images[shuffled(len(images), self.split_seed)].split([1437, 180, 180])
        return dict(zip(("train", "val", "test"), parts, strict=True))
