r"""Diagonal Gaussians and the two ways of comparing them.

.. math::
    KL(N(μ_1, σ_1^2) ‖ N(μ_2, σ_2^2)) = \ln(σ_2/σ_1) + (σ_1^2 + (μ_1 - μ_2)^2) / (2 σ_2^2) - 1/2

per dimension (Kingma & Welling 2014, appendix B, with the sign that makes it non-negative). Every function
returns **nats per example**: a sum over all dimensions but the first, never a mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from losses.draws import randn_like

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def full_precision(x: Tensor) -> Tensor:
    """Returns ``x`` in at least float32: bfloat16 and float16 are widened, float32 and float64 stay as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def inverse_std(log_std: Tensor) -> Tensor:
    """Returns exp(-ln σ), where it overflows a large finite number: means that agree are then 0 standard deviations apart."""
    return torch.exp((-log_std).clamp(max=math.log(torch.finfo(log_std.dtype).max) - 1))


def sum_except_batch(x: Tensor) -> Tensor:
    """Sums over every dimension but the first: (B, *) -> (B,)."""
    return x.flatten(1).sum(1) if x.ndim > 1 else x


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether ``shape`` broadcasts to ``to`` as it is; torch.broadcast_shapes takes longer than a Gaussian needs."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, wide) for size, wide in pairs)


@dataclass(frozen=True, eq=False)
class DiagGaussian:
    """N(mean, exp(log_std)^2), independent in every dimension.

    Likelihoods are worked out in float32 or better whatever the autocast: narrower parameters are widened on entry.

    Attributes:
        mean: (B, *).
        log_std: ln σ, broadcastable to ``mean``.
    """

    mean: Tensor
    log_std: Tensor

    def __post_init__(self) -> None:
        if not self.mean.is_floating_point():
            raise TypeError(
                f"the mean is {self.mean.dtype}, no floating-point numbers: images of levels go through to_unit first"
            )
        object.__setattr__(self, "mean", full_precision(self.mean))
        object.__setattr__(self, "log_std", full_precision(self.log_std))
        if self.log_std.shape != self.mean.shape and not _broadcasts(self.log_std.shape, self.mean.shape):
            raise ValueError(
                f"log_std of shape {tuple(self.log_std.shape)} does not broadcast to mean {tuple(self.mean.shape)}"
            )

    @classmethod
    def standard(cls, like: Tensor) -> DiagGaussian:
        """Returns N(0, I) with the shape, dtype and device of ``like``."""
        zeros = torch.zeros_like(full_precision(like))
        return cls(zeros, zeros.new_zeros(()))

    def sample(self) -> Tensor:
        """Draws mean + std · ε with ε ~ N(0, I), differentiable in both parameters: (B, *)."""
        return torch.addcmul(self.mean, self.log_std.exp(), randn_like(self.mean))

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns ln N(z; mean, std²) in nats per example: (B, *) -> (B,)."""
        return sum_except_batch(self.log_prob_per_dim(z))

    def log_prob_per_dim(self, z: Tensor) -> Tensor:
        """Returns ln N(z; mean, std²) of each dimension, in nats: (B, *) -> (B, *).

        Raises:
            ValueError: if z has another shape than the mean: by hand, (B,) under (B, 1) gives B² numbers silently.
        """
        if z.shape != self.mean.shape:
            raise ValueError(f"z of shape {tuple(z.shape)} is no draw of N with mean {tuple(self.mean.shape)}: give one shape")
        standardized = (z - self.mean) * inverse_std(self.log_std)
        return -0.5 * standardized.square() - self.log_std - HALF_LOG_2PI


def kl(q: DiagGaussian, p: DiagGaussian) -> Tensor:
    """Returns KL(q ‖ p) in closed form, in nats per example: (B,)."""
    return sum_except_batch(kl_per_dim(q, p))


def kl_per_dim(q: DiagGaussian, p: DiagGaussian) -> Tensor:
    """Returns KL(q ‖ p) of each dimension, in nats: (B, *).

    Raises:
        ValueError: if the means have other shapes, but for one p for all examples, (1, *).
    """
    if p.mean.shape != q.mean.shape and p.mean.shape != (1, *q.mean.shape[1:]):
        raise ValueError(f"KL of Gaussians with means {tuple(q.mean.shape)} and {tuple(p.mean.shape)}: give one shape")
    log_scale = q.log_std - p.log_std  # ln(σ_q / σ_p)
    shift = (q.mean - p.mean) * inverse_std(p.log_std)
    # ½(e^{2a} - 1) - a with expm1: equal variances give exactly 0, and others a rounding of a itself, not of 1
    return 0.5 * (shift.square() + torch.expm1(2 * log_scale)) - log_scale


def log_ratio(q: DiagGaussian, p: DiagGaussian, z: Tensor) -> Tensor:
    """Returns ln q(z) - ln p(z) in nats per example, (B,): for z ~ q an unbiased estimate of KL(q ‖ p)."""
    return q.log_prob(z) - p.log_prob(z)
