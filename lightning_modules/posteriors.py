r"""The two factorisations of q(z_{1:T} | x), each with the KLs that it makes the ELBO pay.

Both walk the chain once and return its latents z_1, ..., z_T: the KL of z_T is the prior term, those of the others are the
matching terms. With T = 1 both are a VAE's posterior.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_modules.base import build
from losses import DiagGaussian, kl, log_ratio
from losses.gaussian import kl_per_dim

Factory = Callable[..., nn.Module]


def gaussian(q: object) -> DiagGaussian:
    """Returns what an encoder gives, if it is a q(z|x).

    Raises:
        ValueError: if it is anything else, a pair of tensors, say.
    """
    if not isinstance(q, DiagGaussian):
        raise ValueError(f"the encoder gives {type(q).__name__}, not the losses.DiagGaussian q(z|x)")
    return q


@dataclass(frozen=True, eq=False)
class Latent:
    """One latent of a drawn chain: z ~ q given what q is given, and p given what p is given. (B, latent_dim) each.

    Attributes:
        q, p, z: as above.
        closes: whether p was given nothing that depends on z, so that KL(q ‖ p) is what the bound pays. Else it pays ln q(z) -
            ln p(z) at the draw.
    """

    q: DiagGaussian
    p: DiagGaussian
    z: Tensor
    closes: bool = True

    def kl(self) -> Tensor:
        """Returns what the bound pays for this latent: (B,), nats."""
        return kl(self.q, self.p) if self.closes else self.log_ratio()

    def kl_of_units(self) -> Tensor:
        """Returns the same of each unit: (B, latent_dim), nats."""
        if self.closes:
            return kl_per_dim(self.q, self.p)
        return self.q.log_prob_per_dim(self.z) - self.p.log_prob_per_dim(self.z)

    def log_ratio(self) -> Tensor:
        """Returns ln q(z) - ln p(z): (B,), nats."""
        return log_ratio(self.q, self.p, self.z)


class MarkovPosterior(nn.Module):
    r"""Bottom-up: q(z_1|x) Π_{t=2}^T q(z_t|z_{t-1}), DDPM's factorisation with learned steps.

    The prior term closes, KL(q(z_T|z_{T-1}) ‖ p(z_T)); a matching term does not, as p(z_t|z_{t+1}) depends on a z_{t+1} that
    was drawn from z_t, so it is the log ratio ln q(z_t|z_{t-1}) - ln p(z_t|z_{t+1}) at the drawn chain: unbiased, and of
    either sign for a single draw.

    Args:
        encoder: x -> q(z_1|x), or its factory.
        transitions: z_{t-1} -> q(z_t|z_{t-1}) for t = 2..T, or one factory for all.
        depth: T.
        latent_dim: dimensions of each z_t.
    """

    estimator = "Markov bottom-up posterior; matching terms are log ratios of one drawn chain"
    consistency = True

    def __init__(
        self, encoder: nn.Module | Factory, transitions: Sequence[nn.Module] | Factory, depth: int, latent_dim: int
    ) -> None:
        super().__init__()
        self.encoder = build(encoder, latent_dim=latent_dim)
        self.transitions = build_transitions(transitions, depth, latent_dim)

    def forward(self, x: Tensor, generative: Sequence[nn.Module]) -> list[Latent]:
        """Draws a chain: x (B, C, H, W) in [-1, 1], ``generative[t-2]``: z_t -> p(z_{t-1}|z_t)."""
        posteriors = [gaussian(self.encoder(x))]
        latents = [posteriors[0].sample()]
        for transition in self.transitions:
            posteriors.append(transition(latents[-1]))
            latents.append(posteriors[-1].sample())
        priors = [p(above) for above, p in zip(latents[1:], generative, strict=True)]
        priors.append(DiagGaussian.standard(latents[-1]))
        closes = [*(False for _ in self.transitions), True]
        return [Latent(*parts) for parts in zip(posteriors, priors, latents, closes, strict=True)]


class TopDownPosterior(nn.Module):
    r"""Top-down: q(z_T|x) Π_{t=T}^2 q(z_{t-1}|z_t, x), whose KLs all close given the z_t above.

    As in the ladder VAE (Sønderby et al. 2016, eqs. 17 to 19), the encoder gives a Gaussian of every z_t from x alone, and
    q(z_{t-1}|z_t, x) is its product with p(z_{t-1}|z_t): precisions add, means are weighted by precision.

    Args:
        encoder: x -> Gaussians of z_1, ..., z_T side by side, (B, T · latent_dim), or its factory.
        transitions: not used: q's steps are p's, corrected by x.
        depth: T.
        latent_dim: dimensions of each z_t.
    """

    estimator = "top-down posterior; every KL in closed form given the draw above"

    def __init__(self, encoder: nn.Module | Factory, transitions: object, depth: int, latent_dim: int) -> None:
        super().__init__()
        self.depth = depth
        self.encoder = build(encoder, latent_dim=depth * latent_dim)

    def forward(self, x: Tensor, generative: Sequence[nn.Module]) -> list[Latent]:
        """Draws a chain from the top: x (B, C, H, W) in [-1, 1], ``generative[t-2]``: z_t -> p(z_{t-1}|z_t)."""
        evidence = gaussian(self.encoder(x))
        log_stds = evidence.log_std.expand_as(evidence.mean).chunk(self.depth, 1)
        *lower, q = [
            DiagGaussian(mean, log_std) for mean, log_std in zip(evidence.mean.chunk(self.depth, 1), log_stds, strict=True)
        ]
        latents = [Latent(q, DiagGaussian.standard(q.mean), q.sample())]
        for below, transition in zip(reversed(lower), reversed(generative), strict=True):
            p = transition(latents[-1].z)
            q = product(below, p)
            latents.append(Latent(q, p, q.sample()))
        return latents[::-1]


def product(a: DiagGaussian, b: DiagGaussian) -> DiagGaussian:
    """Returns the normalised product of two Gaussian densities: N with precision σ_a⁻² + σ_b⁻² and the weighted mean."""
    weight = torch.sigmoid(2 * (b.log_std - a.log_std))  # σ_a⁻² / (σ_a⁻² + σ_b⁻²), without overflow
    log_std = -0.5 * torch.logaddexp(-2 * a.log_std, -2 * b.log_std)
    return DiagGaussian(b.mean + weight * (a.mean - b.mean), log_std)


def build_transitions(transitions: Sequence[nn.Module] | Factory, depth: int, latent_dim: int) -> nn.ModuleList:
    """Returns T - 1 transitions between neighbouring latents: those given, or one from the factory for each."""
    if callable(transitions) and not isinstance(transitions, nn.ModuleList):
        transitions = [transitions(in_dim=latent_dim, out_dim=latent_dim) for _ in range(depth - 1)]
    if len(transitions) != depth - 1:
        raise ValueError(f"a hierarchy of depth={depth} has {depth - 1} transitions, got {len(transitions)}")
    return nn.ModuleList(transitions)
