"""What every part of an evaluation needs: the model, the images, devices, and progress."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from lightning.fabric import Fabric
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig
from torch import Tensor

from evaluation.progress import progress
from evaluation.rows import Rows, gather
from lightning_modules import LikelihoodModule


class SplitImages:
    """The images of one split, without the mirror images that training keeps behind its own."""

    def __init__(self, images: Any, num: int) -> None:
        self.images, self.num = images, num

    @classmethod
    def of(cls, datamodule: LightningDataModule, split: str) -> SplitImages:
        """Returns the split's images."""
        return cls(datamodule.splits[split], datamodule.sizes[split])

    def __len__(self) -> int:
        return self.num

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Returns the images of ``index``."""
        return self.images.index_select(dim, index)


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

    def gather(
        self,
        rows: Rows,
        function: Callable[[Tensor], Tensor],
        width: int,
        done: Callable[[int], None] = lambda _: None,
        partial: bool = False,
    ) -> tuple[Tensor, bool]:
        """See :func:`evaluation.rows.gather`."""
        return gather(rows, function, width, self.fabric, self.cfg.batch_size, done, partial)

    def progress(self, title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Shows progress on rank 0."""
        return progress(title, total, quiet=self.fabric.global_rank > 0)
