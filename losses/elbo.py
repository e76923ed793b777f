"""The record that every model returns: the three terms of the bound, per example, in nats."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIGNS = {"reconstruction": 1, "prior": -1, "matching": -1}  # of each term in the bound; costs have the other one


@dataclass(frozen=True, eq=False)
class Elbo:
    """ELBO(x) = reconstruction - prior - matching ≤ ln p(x), never reweighted.

    Attributes:
        reconstruction: E_q ln p(x | z_1), (B,), nats.
        prior: KL(q(z_T | ·) ‖ p(z_T)), (B,), nats.
        matching: the KLs of all the levels in between, summed, (B,), nats; zero for a VAE.
    """

    reconstruction: Tensor
    prior: Tensor
    matching: Tensor

    def __post_init__(self) -> None:
        if self.reconstruction.ndim != 1 or not self.reconstruction.shape == self.prior.shape == self.matching.shape:
            shapes = [tuple(term.shape) for term in (self.reconstruction, self.prior, self.matching)]
            raise ValueError(f"the terms of an ELBO are per example, of one shape (B,); got {shapes}")

    @property
    def value(self) -> Tensor:
        """The bound itself: (B,), nats."""
        return self.reconstruction - self.prior - self.matching

    def terms(self) -> Tensor:
        """Returns the terms in the order of :data:`SIGNS`, whose signs they do not have yet: (3, B), nats."""
        return torch.stack([getattr(self, name) for name in SIGNS])

    def bits_per_dim(self, num_dims: int) -> Tensor:
        """Returns -ELBO / (D ln 2), (B,).

        Args:
            num_dims: D, the number of dimensions of one example (C·H·W for an image).
        """
        return nats_to_bits_per_dim(-self.value, num_dims)


def nats_to_bits_per_dim(nats: Tensor | float, num_dims: int) -> Tensor | float:
    """Returns nats / (D ln 2), of any term of the bound or its standard error: the only place where nats become bits."""
    return nats / (num_dims * math.log(2))
