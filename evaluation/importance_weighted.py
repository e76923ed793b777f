r"""Importance-weighted bounds: ln (1/K) Σ_k p(x, z_k)/q(z_k|x) (Burda et al. 2016, eq. 8).

K = 1 is the ELBO in expectation; the bound never falls with K and tends to ln p(x).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from lightning.fabric import Fabric
from torch import Tensor

from evaluation.rows import Rows, over_batches
from lightning_modules import LikelihoodModule


@dataclass(frozen=True, eq=False)
class ImportanceWeighted:
    """The bound of each image.

    Attributes:
        bounds: (N,) float64, nats.
        effective: effective number of the K draws, (Σw)²/Σw², (N,): near 1 when one draw carries the sum, and the bound is
            then far below ln p(x).
    """

    bounds: Tensor
    effective: Tensor


def importance_weighted(model: LikelihoodModule, rows: Rows, fabric: Fabric, batch_size: int, done) -> ImportanceWeighted:
    """Works out the bound with K = ``rows.replicates``, holding no more than one batch of draws.

    Args:
        model: any of the three families.
        rows: K rows for each image.
        fabric: where.
        batch_size: draws at once.
        done: told how many rows were finished.
    """
    # ln Σ_k w_k and ln Σ_k w_k² of each image, in float64
    sums = torch.full((2, len(rows.order)), -math.inf, dtype=torch.float64)
    for numbers, log_weights in over_batches(rows, model.log_weight, fabric, batch_size, done):
        images = numbers // rows.replicates
        for image in images.unique():
            own = log_weights[images == image]
            part = torch.stack([own.logsumexp(0), (2 * own).logsumexp(0)])
            sums[:, image] = torch.logaddexp(sums[:, image], part)
    if fabric.world_size > 1:
        sums = fabric.all_gather(sums).cpu().logsumexp(0)
    bounds = sums[0] - math.log(rows.replicates)
    return ImportanceWeighted(bounds, torch.exp(2 * sums[0] - sums[1]))
