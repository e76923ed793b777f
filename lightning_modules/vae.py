r"""VAE: ELBO(x) = E_q ln p_θ(x|z) - KL(q_φ(z|x) ‖ N(0, I)) (Kingma & Welling 2014, eq. 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_modules.base import build
from lightning_modules.latents import LatentModule
from lightning_modules.posteriors import Latent, gaussian
from losses import DiagGaussian, Likelihood


class VAELightningModule(LatentModule):
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
        super().__init__(likelihood, latent_dim, beta, **settings)
        sizes = {"image_shape": self.image_shape, "latent_dim": latent_dim}
        self.encoder = build(encoder, **sizes)
        self.decoder = build(decoder, params_per_channel=likelihood.params_per_channel, **sizes)

    def latents_of(self, x: Tensor) -> list[Latent]:
        """Draws z ~ q(z|x): the one latent of the hierarchy."""
        q = gaussian(self.encoder(self.to_unit(x)))
        return [Latent(q, DiagGaussian.standard(q.mean), q.sample())]

    def descend(self, z: Tensor) -> Tensor:
        """Returns z, which is the first and the last latent."""
        return z
