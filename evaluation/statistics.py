"""Means with their two errors: one from having these images and not others, one from the noise of the estimate."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Figure:
    """A mean over images.

    Attributes:
        mean: the estimate.
        se: its standard error, over images and noise together: what another test set would move it by.
        se_images: the part that more draws would not lower.
        se_noise: the Monte-Carlo part: what another seed would move it by on these very images. With one replicate both parts
            are NaN, as they cannot be told apart.
        num: images.
    """

    mean: float
    se: float
    se_images: float
    se_noise: float
    num: int

    def as_dict(self, scale: float = 1.0) -> dict[str, float]:
        """Returns {mean, se, se_images, se_noise}, multiplied; an unknown error is null in JSON."""
        values = asdict(self)
        values.pop("num")
        return {key: None if math.isnan(value) else value * scale for key, value in values.items()}


def figure(values: Tensor, groups: Tensor) -> Figure:
    """Summarises replicates of each image.

    Args:
        values: (N, R) float64: R independent estimates for each of N images.
        groups: (N,): images of one group may share randomness, groups do not. The noise of a group's sum is read off its
            replicates, so errors that images share or cancel within a group are counted as they are, and neither is taken for
            a difference between images.
    """
    num, replicates = values.shape
    per_image = values.mean(1)
    if replicates == 1:
        se = (per_image.var() / num).sqrt().item() if num > 1 else math.nan
        return Figure(per_image.mean().item(), se, math.nan, math.nan, num)
    _, index = groups.unique(return_inverse=True)
    sums = torch.zeros(int(index.max()) + 1, replicates, dtype=values.dtype).index_add_(0, index, values)
    of_mean = sums.var(1).sum().item() / replicates / num**2
    images = math.nan
    if num > 1:
        # Images' means spread by their noise, too: by each one's own, less what all share. Where a group's noise cancels, the
        # mean is far more exact than that spread says.
        of_images = values.var(1).sum().item() / replicates
        noise_spread = (of_images - num * of_mean) / (num - 1)
        images = math.sqrt(max(0.0, per_image.var().item() - noise_spread) / num)
    return Figure(per_image.mean().item(), math.hypot(images, math.sqrt(of_mean)), images, math.sqrt(of_mean), num)
