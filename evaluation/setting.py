"""What every part of an evaluation needs: the model, the images, devices, and progress."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from lightning.fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor

from datamodules import ImageDataModule
from datamodules.base import Images
from diffusion.control import level_counts
from evaluation.progress import progress
from evaluation.rows import Rows, gather
from lightning_modules import LikelihoodModule
from runs.build import SettingError

COUNTED = 50_000  # images: what one of them has in a pixel of each level is 2 kB


class SplitImages:
    """The images of one split as they are scored, which are looked at for levels that the data should not have."""

    def __init__(self, images: Images, num: int, levels: int | None) -> None:
        self.images, self.num, self.levels = images, num, levels

    @classmethod
    def of(cls, datamodule: ImageDataModule, split: str) -> SplitImages:
        """Returns the split's images."""
        return cls(datamodule.scored(split), datamodule.sizes[split], datamodule.levels)

    def __len__(self) -> int:
        return self.num

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Returns the images of ``index``.

        Raises:
            SettingError: for values outside 0..levels-1, which would have a finite bound.
        """
        images = self.images.index_select(dim, index)
        low, high = images.min().item(), images.max().item()
        if self.levels is not None and not 0 <= low <= high < self.levels:
            raise SettingError(f"the images hold values {low}..{high}, but the data says 0..{self.levels - 1}")
        return images


@dataclass(frozen=True, eq=False)
class Setting:
    """What every part of an evaluation needs.

    Attributes:
        cfg: the evaluation's config.
        model: on its device, with the weights to evaluate.
        images: the split.
        fabric: devices and precision.
    """

    cfg: DictConfig
    model: LikelihoodModule
    images: SplitImages
    fabric: Fabric

    def rows(self, replicates: int, purpose: str, num: int | None = None) -> Rows:
        """Returns rows of the evaluation's images, or of the first ``num`` of them."""
        limit = min(len(self.images), self.cfg.max_images or len(self.images), num or len(self.images))
        return Rows.of_split(self.images, limit, replicates, self.cfg.seed, purpose)

    def level_counts(self) -> Tensor | None:
        """Returns how many pixels of each image have each level, of :data:`COUNTED` images at most: (N, L)."""
        if self.images.levels is None:
            return None
        order, counts = self.rows(1, "bound", COUNTED).order, []
        with self.progress("counting levels", len(order)) as done:
            for part in order.split(1024):
                counts.append(level_counts(self.images.index_select(0, part), self.images.levels))
                done(len(part))
        return torch.cat(counts)

    def gather(
        self,
        rows: Rows,
        function: Callable[[Tensor], Tensor],
        width: int,
        done: Callable[[int], None] = lambda _: None,
        partial: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See :func:`evaluation.rows.gather`."""
        return gather(rows, function, width, self.fabric, self.cfg.batch_size, done, partial)

    def progress(self, title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Shows progress on rank 0."""
        return progress(title, total, quiet=self.fabric.global_rank > 0)
