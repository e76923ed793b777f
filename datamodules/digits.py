"""The 1797 handwritten digits of scikit-learn, 8x8 with 17 levels: real data that comes with an installed package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datamodules.base import ImageDataModule


class DigitsDataModule(ImageDataModule):
    """Optical recognition of handwritten digits (Alpaydin and Kaynak 1998).

    Split into 1437, 180 and 180 images, each with its share of every class.

    Args:
        shared: the settings of :class:`ImageDataModule`.
    """

    name = "digits"

    def __init__(self, **shared: Any) -> None:
        super().__init__(**shared, actual_shape=(1, 8, 8), actual_levels=17)

    def load(self) -> dict[str, Tensor]:
        """Reads the splits, each uint8 (n, 1, 8, 8)."""
        # here, because scikit-learn is slow to import and no other data set needs it
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
        fixed = {"random_state": self.split_seed}
        train, held_out = train_test_split(range(len(images)), test_size=360, stratify=digits.target, **fixed)
        val, test = train_test_split(held_out, test_size=180, stratify=digits.target[held_out], **fixed)
        return {name: images[torch.tensor(part)] for name, part in (("train", train), ("val", val), ("test", test))}
