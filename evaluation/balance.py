r"""How a VAE spends its latents: KL of each unit, active units, and the aggregate posterior against the prior.

With q(z) = (1/N) Σ_i q(z|x_i), the mean KL to the prior splits (Hoffman & Johnson 2016, "ELBO surgery"):

.. math::  (1/N) Σ_i KL(q(z|x_i) ‖ p(z)) = I_q(x; z) + KL(q(z) ‖ p(z)), \qquad I_q ≤ \ln N

the information that z keeps of which image it came from, and the mismatch that samples from the prior suffer from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from lightning.fabric import Fabric
from torch import Tensor

from evaluation.rows import Rows, over_batches
from lightning_modules import LatentModule
from losses import DiagGaussian
from losses.gaussian import HALF_LOG_2PI

AT_ONCE = 256  # draws, each against the posteriors of all images
FEW_IMAGES = 16
ACTIVE = 0.01  # variance over images of a unit's posterior mean (Burda et al. 2016, section 5)


@dataclass(frozen=True, eq=False)
class LatentBalance:
    """One latent z_t, over N images with R draws each.

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


def measure_latents(
    model: LatentModule, rows: Rows, fabric: Fabric, batch_size: int, done: Callable[[int], None]
) -> tuple[list[LatentBalance], dict[str, float]]:
    """Measures every latent of a VAE or MHVAE, and the aggregate posterior of a VAE.

    Args:
        model: whose latents are measured.
        rows: R ≥ 2 draws of each image.
        fabric: this rank evaluates everything by itself, as the aggregate needs every row.
        batch_size: rows at once.
        done: told how many rows were finished.

    Returns:
        (latents from z_1 up, {mutual_information, marginal_kl} in nats; empty for more than one latent).
    """

    def numbers_of(x: Tensor) -> Tensor:
        parts = []
        for latent in model.latents_of(x):
            log_std, log_p = latent.q.log_std.expand_as(latent.q.mean), latent.p.log_prob_per_dim(latent.z)
            parts.append(torch.stack([latent.kl_of_units(), latent.q.mean, log_std, latent.z, log_p], 1).flatten(2))
        return torch.stack(parts, 1)

    kls, means, within, draws = (_Moments() for _ in range(4))
    kept = []  # of one latent alone: what the aggregate needs, two draws of each image
    for values in _by_image(rows, over_batches(rows, numbers_of, fabric, batch_size, done, share=False)):
        kl, mean, log_std, z, log_p = values.permute(3, 2, 0, 1, 4)  # each (T, b, R, d)
        kls.add(kl.flatten(1, 2))
        means.add(mean.mean(2))
        within.add(mean.var(2))
        draws.add(z.flatten(1, 2))
        if len(kl) == 1:
            kept.append((mean[0, :, 0], log_std[0, :, 0], z[0, :, :2], log_p[0, :, :2].sum(2), kl[0, :, 0].sum(1)))
    # the means of a few draws vary more over images than E[z_t|x] does: by the draws' own variance
    spread = (means.variance - within.mean / rows.replicates).clamp(min=0)
    latents = [LatentBalance(*parts) for parts in zip(kls.mean, spread, draws.mean, draws.variance, strict=True)]
    if not kept:
        return latents, {}
    mean, log_std, z, log_p, kl = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return latents, _surgery(DiagGaussian(mean, log_std), z, log_p, kl)


def _by_image(rows: Rows, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """Yields the values of all draws of some images, (b, R, *): batches of rows may end within an image."""
    pending = None
    for _, values in batches:
        pending = values if pending is None else torch.cat([pending, values])
        whole = len(pending) // rows.replicates * rows.replicates
        if whole:
            yield pending[:whole].unflatten(0, (-1, rows.replicates))
        pending = pending[whole:]


class _Moments:
    """Mean and variance of (T, n, d) over all n that come in parts (Chan et al. 1983), each (T, d)."""

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, torch.tensor(0.0), torch.tensor(0.0)

    def add(self, values: Tensor) -> None:
        """Adds a part."""
        num, mean = values.shape[1], values.mean(1)
        shift, count = mean - self.mean, self.count + num
        self._squares = (
            self._squares + (values - mean.unsqueeze(1)).square().sum(1) + shift.square() * (self.count * num / count)
        )
        self.mean = self.mean + shift * (num / count)
        self.count = count

    @property
    def variance(self) -> Tensor:
        """Over one less than there are."""
        return self._squares / (self.count - 1)


def _surgery(q: DiagGaussian, z: Tensor, log_p: Tensor, kl: Tensor) -> dict[str, float]:
    """I_q(x; z) and KL(q(z) ‖ p(z)), which sum to the mean KL, from two draws of each q(z|x_i).

    Args:
        q: (N, d).
        z: the draws, (N, 2, d).
        log_p: ln p(z) of each, (N, 2).
        kl: KL(q(z|x_i) ‖ p(z)), (N,).
    """
    told, noise = [], []
    for draw, prior in zip(z.unbind(1), log_p.unbind(1), strict=True):
        own = q.log_prob(draw)
        told.append(own - _mixture_log_prob(q, draw))
        noise.append(own - prior - kl)  # the draws' part of ln q(z|x) - ln p(z), of mean 0
    # the two share it as they vary with it: as the other draws say, since a share of one's own would be biased
    if len(kl) < FEW_IMAGES:  # a share of so few adds more noise than it takes
        return _split(torch.stack(told), kl)
    shares = [
        ((a - a.mean()) * b).sum() / b.square().sum().clamp(min=torch.finfo(b.dtype).tiny)
        for a, b in zip(told, noise, strict=True)
    ]
    parts = [a - share * b for a, b, share in zip(told, noise, reversed(shares), strict=True)]
    return _split(torch.stack(parts), kl)


def _split(information: Tensor, kl: Tensor) -> dict[str, float]:
    """Returns the mean KL's two parts."""
    mean = information.mean().item()
    return {"mutual_information": mean, "marginal_kl": kl.mean().item() - mean}


def _mixture_log_prob(q: DiagGaussian, z: Tensor) -> Tensor:
    """Ln (1/N) Σ_i q_i(z_j) of each z_j, nats: N Gaussians (N, d), z (M, d) -> (M,), all float64.

    The squares are multiplied out, so that a matrix product sums them; with means near 1, a σ of 1e-5 costs some 1e-3 nats.
    """
    precision = torch.exp(-2 * q.log_std)
    constant = (q.log_std + HALF_LOG_2PI).sum(1)
    pieces = []
    for some in z.split(AT_ONCE):
        squares = some.square() @ precision.T - 2 * some @ (precision * q.mean).T + (precision * q.mean.square()).sum(1)
        pieces.append((-0.5 * squares.clamp(min=0) - constant).logsumexp(1))
    return torch.cat(pieces) - math.log(len(q.mean))
