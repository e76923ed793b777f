"""p(z_{t-1} | z_t) and q(z_t | z_{t-1}): the links of a hierarchical VAE, each a Gaussian given one neighbouring latent."""

from __future__ import annotations

from torch import Tensor, nn

from losses import DiagGaussian
from networks.mlp import GaussianHead, residual_mlp


class GaussianTransition(nn.Module):
    """N(mean(z), σ(z)²) over one latent, given its neighbour z.

    Args:
        in_dim: width of z.
        out_dim: width of the Gaussian.
        hidden_dim: width of the residual blocks.
        num_blocks: number of residual blocks.
        dropout: probability of dropping a hidden unit in each block, in [0, 1).

    Raises:
        ValueError: if a size is not a positive integer.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int = 128, num_blocks: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(residual_mlp(in_dim, hidden_dim, num_blocks, dropout), GaussianHead(hidden_dim, out_dim))

    def forward(self, z: Tensor) -> DiagGaussian:
        """Returns the Gaussian: z (B, in_dim) -> (B, out_dim)."""
        return self.net(z)
