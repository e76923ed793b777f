r"""How a VAE spends its latents: KL of each unit, active units, and the aggregate posterior against the prior.

With q(z) = (1/N) Σ_i q(z|x_i), the mean KL to the prior splits (Hoffman & Johnson 2016, "ELBO surgery"):

.. math::  (1/N) Σ_i KL(q(z|x_i) ‖ p(z)) = I_q(x; z) + KL(q(z) ‖ p(z)), \qquad I_q ≤ \ln N

the information that z keeps of which image it came from, and the mismatch that samples from the prior suffer from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from lightning.fabric import Fabric
from torch import Tensor

from evaluation.rows import Rows, over_batches
from lightning_modules import LatentModule
from losses import DiagGaussian

ACTIVE = 0.01  # variance over images of a unit's posterior mean (Burda et al. 2016, section 5)


@dataclass(frozen=True, eq=False)
class LevelBalance:
    """One level z_t, over N images with R draws each.

    Attributes:
        kl: what the bound pays for each unit, (d,), nats: in closed form where the model has it so.
        mean_variance: variance over images of E[z_t|x], (d,).
        aggregate_mean: mean of q(z_t) over images and draws, (d,).
        aggregate_variance: its variance, (d,).
    """

    kl: Tensor
    mean_variance: Tensor
    aggregate_mean: Tensor
    aggregate_variance: Tensor

    @property
    def active(self) -> int:
        """Units whose posterior mean moves with the image."""
        return int((self.mean_variance > ACTIVE).sum())


def measure_levels(
    model: LatentModule, rows: Rows, fabric: Fabric, batch_size: int
) -> tuple[list[LevelBalance], dict[str, float]]:
    """Measures every level of a VAE or MHVAE, and the aggregate posterior of a VAE.

    Args:
        model: whose latents are measured.
        rows: R ≥ 2 draws of each image.
        fabric: this rank evaluates everything by itself: it is cheap.
        batch_size: rows at once.

    Returns:
        (levels from z_1 up, {mutual_information, marginal_kl} in nats; empty for more than one level).
    """

    def numbers_of(x: Tensor) -> Tensor:
        parts = []
        for level in model.levels_of(x):
            log_std = level.q.log_std.expand_as(level.q.mean)
            parts.append(torch.stack([level.kl_of_units(), level.q.mean, log_std, level.z], 1).flatten(2))
        return torch.stack(parts, 1)

    batches = [values for _, values in over_batches(rows, numbers_of, fabric, batch_size, lambda _: None, share=False)]
    values = torch.cat(batches).unflatten(0, (len(rows.order), rows.replicates))  # (N, R, levels, 4, d)
    kl, mean, log_std, z = values.permute(3, 2, 0, 1, 4)
    replicates = rows.replicates
    levels = []
    for level in range(len(kl)):
        within = mean[level].var(1).mean(0) / replicates if replicates > 1 else 0.0
        # the means of a few draws vary more over images than E[z_t|x] does: by the draws' own variance
        spread = (mean[level].mean(1).var(0) - within).clamp(min=0)
        flat = z[level].flatten(0, 1)
        levels.append(LevelBalance(kl[level].mean((0, 1)), spread, flat.mean(0), flat.var(0)))
    aggregate = {}
    if len(levels) == 1:
        q = DiagGaussian(mean[0, :, 0], log_std[0, :, 0])
        aggregate = _surgery(q, z[0, :, 0], kl[0, :, 0].sum(1))
    return levels, aggregate


def _surgery(q: DiagGaussian, z: Tensor, kl: Tensor) -> dict[str, float]:
    """I_q(x; z) and KL(q(z) ‖ p(z)), which sum to the mean KL, from one draw of each q(z|x_i): q and z (N, d), kl (N,)."""
    own = q.log_prob(z)
    log_marginal = []
    for index in range(len(z)):
        log_densities = DiagGaussian(q.mean, q.log_std).log_prob(z[index : index + 1].expand_as(q.mean))
        log_marginal.append(log_densities.logsumexp(0) - math.log(len(z)))
    marginal = torch.stack(log_marginal)
    # the draws' part of ln q(z|x) - ln p(z), of mean 0: the two share it as they vary with it
    noise = own - DiagGaussian.standard(z).log_prob(z) - kl
    told = own - marginal
    share = ((told - told.mean()) * noise).sum() / noise.square().sum().clamp(min=torch.finfo(noise.dtype).tiny)
    information = (told - share * noise).mean().item()
    return {"mutual_information": information, "marginal_kl": kl.mean().item() - information}
