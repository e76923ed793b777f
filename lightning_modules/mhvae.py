r"""Markovian hierarchical VAE: p(z_T) p(x|z_1) Π_{t=2}^T p(z_{t-1}|z_t), and q(z_1..z_T|x).

The last sum of the bound (:mod:`lightning_modules.latents`) is the matching term. How its KLs are estimated depends on the
posterior's factorisation: see :mod:`lightning_modules.posteriors`. T = 1 is the VAE, term for term.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_modules.base import build
from lightning_modules.latents import LatentModule
from lightning_modules.posteriors import Factory, Latent, build_transitions
from losses import Likelihood
from losses.checks import MOST_LAYERS, is_whole


class MHVAELightningModule(LatentModule):
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
        super().__init__(likelihood, latent_dim, beta, **settings)
        if not is_whole(depth, 1, MOST_LAYERS):
            raise ValueError(
                f"model.depth={depth!r} must be an integer of at least 1 and at most {MOST_LAYERS}: the number of latents "
                "(1 is a VAE)"
            )
        self.depth = depth
        sizes = {"depth": depth, "latent_dim": latent_dim}
        if not isinstance(posterior, nn.Module):
            if encoder is None:
                raise ValueError("model.encoder is missing: this posterior is built from one; give it built, or give a factory")
            posterior = posterior(encoder=partial(encoder, image_shape=self.image_shape), transitions=transition, **sizes)
            shared = {id(module) for module in transition} if isinstance(transition, Sequence) else set()
            if shared & {id(module) for module in posterior.modules()}:
                raise ValueError("these transitions are p's, and this posterior has its own: give it built, or give a factory")
        self.posterior = posterior
        self.consistency = depth > 1 and getattr(posterior, "consistency", False)
        self.generative = build_transitions(transition, **sizes)
        self.decoder = build(
            decoder, image_shape=self.image_shape, latent_dim=latent_dim, params_per_channel=likelihood.params_per_channel
        )

    def latents_of(self, x: Tensor) -> list[Latent]:
        """Draws the chain of latents, z_1 first."""
        return self.posterior(self.to_unit(x), self.generative)

    def descend(self, z: Tensor) -> Tensor:
        """Draws z_{T-1}, ..., z_1 by the transitions of p."""
        for transition in reversed(self.generative):
            z = transition(z).sample()
        return z

    def protocol(self) -> dict[str, Any]:
        """See :meth:`LikelihoodModule.protocol`."""
        return {"estimator": getattr(self.posterior, "estimator", "one draw of the latents for each image")}
