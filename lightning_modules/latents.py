r"""What VAE and MHVAE share: latents z_1, ..., z_T, of which the likelihood sees z_1.

.. math::  ELBO(x) = E_q[\ln p(x|z_1)] - KL(q(z_T|·) ‖ N(0, I)) - Σ_{t=1}^{T-1} (KL \text{ of } z_t)
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.base import LikelihoodModule
from lightning_modules.posteriors import Latent
from losses import Elbo, Likelihood


class LatentModule(LikelihoodModule):
    """A decoder of z_1, and the bound of a drawn chain of latents.

    Attributes:
        decoder: z_1 -> the likelihood's parameters (B, P·C, H, W).

    Args:
        likelihood: p(x|z_1).
        latent_dim: dimensions of each z_t.
        beta: weight of all KLs in the loss (Higgins et al. 2017). The reported bound always has 1.
        **settings: see :class:`LikelihoodModule`.

    Raises:
        ValueError: if the likelihood has other levels than the data, or for a negative ``beta``.
    """

    decoder: nn.Module

    def __init__(self, likelihood: Likelihood, latent_dim: int, beta: float, **settings: Any) -> None:
        super().__init__(**settings)
        if likelihood.levels != self.levels:
            name = type(likelihood).__name__
            raise ValueError(
                f"{name} is for {likelihood.levels} levels, but the data is continuous: choose model/likelihood=gaussian"
                if self.levels is None
                else f"{name} is for {likelihood.levels or 'continuous data, not'} levels, but the data has {self.levels}"
            )
        if not 0 <= beta < math.inf:
            raise ValueError(
                f"model.beta={beta} must be a number of at least 0: it weighs the KL terms of the loss (1 is the bound itself)"
            )
        self.likelihood, self.latent_dim, self.beta = likelihood, latent_dim, beta

    @abstractmethod
    def latents_of(self, x: Tensor) -> list[Latent]:
        """Draws the latents of x (B, C, H, W), z_1 first."""

    @abstractmethod
    def descend(self, z: Tensor) -> Tensor:
        """Draws z_1 ~ p(z_1|z_T), given z_T (B, latent_dim)."""

    def elbo(self, x: Tensor) -> Elbo:
        """Returns the bound with one draw of the latents."""
        latents = self.latents_of(x)
        *matching, prior = (latent.kl() for latent in latents)
        total = torch.stack(matching).sum(0) if matching else torch.zeros_like(prior)
        return Elbo(self.likelihood.log_prob(self.decoder(latents[0].z), x), prior, total)

    def log_weight(self, x: Tensor) -> Tensor:
        """See :meth:`LikelihoodModule.log_weight`."""
        latents = self.latents_of(x)
        log_ratio = torch.stack([latent.log_ratio() for latent in latents]).sum(0)
        return self.likelihood.log_prob(self.decoder(latents[0].z), x) - log_ratio

    def objective(self, x: Tensor) -> tuple[Tensor, Elbo]:
        """Returns -(reconstruction - β · (prior + matching)) per dimension, and the bound."""
        elbo = self.elbo(x)
        return (self.beta * (elbo.prior + elbo.matching) - elbo.reconstruction).mean() / self.num_dims, elbo

    def sample(self, num: int, mean: bool = False) -> Tensor:
        """See :meth:`LikelihoodModule.sample`."""
        z = torch.randn(num, self.latent_dim, device=self.device, dtype=self.likelihood_dtype)
        params = self.decoder(self.descend(z))
        return self.likelihood.mean(params) if mean else self.likelihood.sample(params)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Returns the mean of p(x|z_1) for z_1 ~ q(z_1|x): (B, C, H, W), as images are."""
        return self.likelihood.mean(self.decoder(self.latents_of(x)[0].z))

    def latent_kls(self, x: Tensor) -> Tensor:
        """See :meth:`LikelihoodModule.latent_kls`: (T, B)."""
        return torch.stack([latent.kl() for latent in self.latents_of(x)])
