r"""Markovian hierarchical VAE: p(z_T) p(x|z_1) Π_{t=2}^T p(z_{t-1}|z_t), and q(z_1..z_T|x).

.. math::  ELBO(x) = E_q[\ln p(x|z_1)] - KL(q(z_T|·) ‖ N(0, I)) - Σ_{t=1}^{T-1} (KL \text{ of } z_t)

The middle sum is the matching term. How its KLs are estimated depends on the posterior's factorisation: see
:mod:`lightning_modules.posteriors`. T = 1 is the VAE, term for term.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.base import LikelihoodModule, build
from lightning_modules.posteriors import Factory, Level, build_transitions, log_weight
from lightning_modules.vae import check_beta, check_likelihood
from losses import Elbo, Likelihood


class MHVAELightningModule(LikelihoodModule):
    """T latents in a chain.

    Args:
        posterior: q(z_{1:T}|x), or its class (:class:`MarkovPosterior`, :class:`TopDownPosterior`), built here from encoder
            and transition.
        encoder: factory of the posterior's first network; not needed with a built posterior.
        transition: factory (``in_dim, out_dim``) of p(z_{t-1}|z_t) and of q's steps, or the T - 1 modules of p from t = 2 up.
        decoder: z_1 -> the likelihood's parameters, or its factory.
        likelihood: p(x|z_1).
        depth: T ≥ 1.
        latent_dim: dimensions of each z_t.
        beta: weight of all KLs in the loss. The reported bound always has 1.
        **settings: see :class:`LikelihoodModule`.
    """

    def __init__(
        self,
        posterior: nn.Module | Callable[..., nn.Module],
        decoder: nn.Module | Factory,
        likelihood: Likelihood,
        depth: int,
        latent_dim: int,
        encoder: Factory | None = None,
        transition: Factory | Sequence[nn.Module] = (),
        beta: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        check_likelihood(likelihood, self.levels)
        check_beta(beta)
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise ValueError(
                f"model.depth={depth!r} must be an integer of at least 1: it is the number of latents (1 is a VAE)"
            )
        self.likelihood, self.depth, self.latent_dim, self.beta = likelihood, depth, latent_dim, beta
        sizes = {"depth": depth, "latent_dim": latent_dim}
        if not isinstance(posterior, nn.Module):
            if encoder is None:
                raise ValueError("model.encoder is missing: this posterior is built from one; give it built, or give a factory")
            posterior = posterior(encoder=partial(encoder, image_shape=self.image_shape), transitions=transition, **sizes)
            shared = {id(module) for module in transition} if isinstance(transition, Sequence) else set()
            if shared & {id(module) for module in posterior.modules()}:
                raise ValueError("these transitions are p's, and this posterior has its own: give it built, or give a factory")
        self.posterior = posterior
        self.generative = build_transitions(transition, **sizes)
        self.decoder = build(
            decoder, image_shape=self.image_shape, latent_dim=latent_dim, params_per_channel=likelihood.params_per_channel
        )

    def levels_of(self, x: Tensor) -> list[Level]:
        """Draws the chain of latents, z_1 first."""
        return self.posterior(self.to_unit(x), self.generative)

    def elbo(self, x: Tensor) -> Elbo:
        """Returns the bound with one draw of the chain."""
        levels = self.levels_of(x)
        kls = [level.kl() for level in levels]
        matching = torch.stack(kls[:-1]).sum(0) if self.depth > 1 else torch.zeros_like(kls[-1])
        return Elbo(self.likelihood.log_prob(self.decoder(levels[0].z), x), kls[-1], matching)

    def log_weight(self, x: Tensor) -> Tensor:
        """See :meth:`LikelihoodModule.log_weight`."""
        levels = self.levels_of(x)
        return log_weight(self.likelihood.log_prob(self.decoder(levels[0].z), x), levels)

    def objective(self, x: Tensor) -> tuple[Tensor, Elbo]:
        """Returns -(reconstruction - β · (prior + matching)) per dimension, and the bound."""
        elbo = self.elbo(x)
        return (self.beta * (elbo.prior + elbo.matching) - elbo.reconstruction).mean() / self.num_dims, elbo

    def sample(self, num: int, mean: bool = False) -> Tensor:
        """See :meth:`LikelihoodModule.sample`."""
        z = torch.randn(num, self.latent_dim, device=self.device, dtype=self.likelihood_dtype)
        for transition in reversed(self.generative):
            z = transition(z).sample()
        params = self.decoder(z)
        return self.likelihood.mean(params) if mean else self.likelihood.sample(params)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Returns the mean of p(x|z_1) for z_1 ~ q(z_1|x): uint8 (B, C, H, W)."""
        return self.likelihood.mean(self.decoder(self.levels_of(x)[0].z))

    def level_kls(self, x: Tensor) -> Tensor:
        """See :meth:`LikelihoodModule.level_kls`: (T, B)."""
        return torch.stack([level.kl() for level in self.levels_of(x)])

    def protocol(self) -> dict[str, Any]:
        """See :meth:`LikelihoodModule.protocol`."""
        return {"estimator": getattr(self.posterior, "estimator", "one draw of the latents for each image")}
