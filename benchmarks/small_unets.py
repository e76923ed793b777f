"""A small U-Net on 3x32x32, and pictures for it: what is in them does not matter to a clock."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from datamodules.base import ImageDataModule
from diffusion import Epsilon, linear, simple
from lightning_modules import DDPMLightningModule
from networks import UNet

SHAPE = (3, 32, 32)
BLOCKS = {"channel_multipliers": (1, 2, 2, 2), "num_res_blocks": 2, "attention_resolutions": (16,)}


def small_ddpm(base_channels: int = 32, dropout: float = 0.1) -> DDPMLightningModule:
    """Returns a DDPM of T = 1000 with the blocks of Ho et al.'s U-Net for CIFAR-10 and fewer channels."""
    network = partial(UNet, base_channels=base_channels, dropout=dropout, **BLOCKS)
    optimizer = partial(torch.optim.AdamW, lr=2e-4, fused=True)
    return DDPMLightningModule(
        network, linear, 1000, Epsilon(), weighting=simple, image_shape=SHAPE, levels=256, optimizer=optimizer
    )


class RandomPictures(ImageDataModule):
    """Smooth random pictures of 3x32x32, mirrored in training.

    Args:
        num: training images.
        batch_size: of a batch.
    """

    name = "random_pictures"

    def __init__(self, num: int, batch_size: int) -> None:
        super().__init__(list(SHAPE), 256, batch_size, 0, actual_shape=SHAPE, actual_levels=256, flip=True)
        self.num = num
        self.setup()

    def load(self) -> dict[str, Tensor]:
        """Draws the splits."""
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randint(256, (self.num + 32, 3, 8, 8), generator=generator, dtype=torch.uint8)
        images = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
        return {"train": images[: self.num], "val": images[self.num : -16], "test": images[-16:]}
