"""Variances σ_t² of the reverse steps: betas (T,) float64 -> (T,) float64.

At t = 1, where the posterior variance β̃_1 is 0, both take β̃_2 (Ho et al. 2020's code); a chain of one step has no β̃_2
and takes β_1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def posterior_variance(betas: Tensor) -> Tensor:
    """β̃_t = β_t (1 - ᾱ_{t-1})/(1 - ᾱ_t), the variance of q(x_{t-1} | x_t, x_0): (T,); β̃_1 = 0."""
    log_alpha_bar = torch.log1p(-betas).cumsum(0)
    noise = -torch.expm1(log_alpha_bar)  # 1 - ᾱ_t without cancellation
    return betas * torch.cat([noise.new_zeros(1), noise[:-1]]) / noise


def small(betas: Tensor) -> Tensor:
    """σ_t² = β̃_t: optimal when x_0 is a point (Ho et al. 2020, section 3.2)."""
    return _with_first_step(posterior_variance(betas), betas)


def large(betas: Tensor) -> Tensor:
    """σ_t² = β_t for t ≥ 2: optimal when x_0 ~ N(0, I) (Ho et al. 2020, section 3.2)."""
    return _with_first_step(betas, betas)


def _with_first_step(variance: Tensor, betas: Tensor) -> Tensor:
    first = posterior_variance(betas)[1:2] if len(betas) > 1 else betas[:1]
    return torch.cat([first, variance[1:]])
