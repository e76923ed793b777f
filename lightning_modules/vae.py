r"""VAE: ELBO(x) = E_q ln p_θ(x|z) - KL(q_φ(z|x) ‖ N(0, I)) (Kingma & Welling 2014, eq. 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.base import LikelihoodModule, build
from lightning_modules.posteriors import Level, gaussian, log_weight
from losses import DiagGaussian, Elbo, Likelihood


def check_likelihood(likelihood: Likelihood, levels: int | None) -> None:
    """Refuses a likelihood of other levels than the data's.

    Raises:
        ValueError: in one sentence, naming both.
    """
    if likelihood.levels != levels:
        name = type(likelihood).__name__
        raise ValueError(
            f"{name} is for {likelihood.levels} levels, but the data is continuous: choose model/likelihood=gaussian"
            if levels is None
            else f"{name} is for {likelihood.levels or 'continuous data, not'} levels, but the data has {levels}"
        )


def check_beta(beta: float) -> None:
    """Refuses negative KL weights."""
    if not 0 <= beta < math.inf:
        raise ValueError(
            f"model.beta={beta} must be a number of at least 0: it weighs the KL terms of the loss (1 is the bound itself)"
        )


class VAELightningModule(LikelihoodModule):
    """One latent.

    Args:
        encoder: x in [-1, 1] (B, C, H, W) -> q(z|x), a DiagGaussian (B, latent_dim); or a factory of ``image_shape`` and
            ``latent_dim``.
        decoder: z -> the likelihood's parameters (B, P·C, H, W); or a factory of these sizes.
        likelihood: p(x|z).
        latent_dim: dimensions of z.
        beta: weight of the KL in the loss (Higgins et al. 2017). The reported bound always has 1.
        **settings: see :class:`LikelihoodModule`.
    """

    def __init__(
        self,
        encoder: nn.Module | Callable[..., nn.Module],
        decoder: nn.Module | Callable[..., nn.Module],
        likelihood: Likelihood,
        latent_dim: int,
        beta: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        check_likelihood(likelihood, self.levels)
        check_beta(beta)
        self.likelihood, self.latent_dim, self.beta = likelihood, latent_dim, beta
        sizes = {"image_shape": self.image_shape, "latent_dim": latent_dim}
        self.encoder = build(encoder, **sizes)
        self.decoder = build(decoder, params_per_channel=likelihood.params_per_channel, **sizes)

    def levels_of(self, x: Tensor) -> list[Level]:
        """Draws z ~ q(z|x): the one level of the hierarchy."""
        q = gaussian(self.encoder(self.to_unit(x)))
        return [Level(q, DiagGaussian.standard(q.mean), q.sample())]

    def elbo(self, x: Tensor) -> Elbo:
        """Returns the bound with one draw z ~ q(z|x)."""
        (level,) = self.levels_of(x)
        prior = level.kl()
        return Elbo(self.likelihood.log_prob(self.decoder(level.z), x), prior, torch.zeros_like(prior))

    def log_weight(self, x: Tensor) -> Tensor:
        """See :meth:`LikelihoodModule.log_weight`."""
        levels = self.levels_of(x)
        return log_weight(self.likelihood.log_prob(self.decoder(levels[0].z), x), levels)

    def objective(self, x: Tensor) -> tuple[Tensor, Elbo]:
        """Returns -(reconstruction - β · prior) per dimension, and the bound."""
        elbo = self.elbo(x)
        return (self.beta * elbo.prior - elbo.reconstruction).mean() / self.num_dims, elbo

    def sample(self, num: int, mean: bool = False) -> Tensor:
        """See :meth:`LikelihoodModule.sample`."""
        params = self.decoder(torch.randn(num, self.latent_dim, device=self.device, dtype=self.likelihood_dtype))
        return self.likelihood.mean(params) if mean else self.likelihood.sample(params)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Returns the mean of p(x|z) for z ~ q(z|x): uint8 (B, C, H, W)."""
        return self.likelihood.mean(self.decoder(self.levels_of(x)[0].z))

    def level_kls(self, x: Tensor) -> Tensor:
        """See :meth:`LikelihoodModule.level_kls`: (1, B)."""
        return self.elbo(x).prior.unsqueeze(0)
