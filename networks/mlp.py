r"""Fully connected networks: residual blocks between two linear maps, for small images that are aligned to their grid.

.. math::  h ← h + W_2\, \mathrm{dropout}(\mathrm{SiLU}(W_1\, \mathrm{LN}(h)))

In the denoiser the LayerNorm is adaptive: its output is scaled and shifted by a linear map of the time embedding
(FiLM, Perez et al. 2018; adaptive LayerNorm, Peebles & Xie 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from losses import DiagGaussian
from losses.checks import MOST_LAYERS, is_whole
from losses.gaussian import full_precision
from networks.conv import LOG_STD_RANGE
from networks.layers import Dropout, check_embedding, run_in_full_precision, soft_clamp, timestep_embedding


def check_sizes(most: int | None = None, **sizes: int) -> None:
    """Refuses sizes of layers below 1, and above ``most`` if it is given.

    Raises:
        ValueError: naming the first size that is no such integer.
    """
    for name, size in sizes.items():
        if not is_whole(size, 1, math.inf if most is None else most):
            bound = "" if most is None else f" and at most {most}"
            raise ValueError(f"{name} must be an integer of at least 1{bound}, got {size!r}")


class ResidualBlock(nn.Module):
    """h + MLP(LayerNorm(h)), the norm scaled and shifted by a condition if there is one.

    Args:
        width: of h.
        dropout: probability of dropping a hidden unit, in [0, 1).
        condition_dim: width of the condition; 0 for none.
    """

    def __init__(self, width: int, dropout: float, condition_dim: int = 0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.film = nn.Linear(condition_dim, 2 * width) if condition_dim else None
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), Dropout(dropout), nn.Linear(width, width))

    def forward(self, h: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns the block's output: h (B, width), condition (B, condition_dim) -> (B, width)."""
        normed = self.norm(h)
        if self.film is not None:
            scale, shift = self.film(condition).chunk(2, 1)
            normed = normed * (1 + scale) + shift
        return h + self.mlp(normed)


def residual_mlp(in_dim: int, hidden_dim: int, num_blocks: int, dropout: float) -> nn.Sequential:
    """Returns a linear map, ``num_blocks`` residual blocks, LayerNorm and SiLU: (B, in_dim) -> (B, hidden_dim)."""
    check_sizes(in_dim=in_dim, hidden_dim=hidden_dim)
    check_sizes(MOST_LAYERS, num_blocks=num_blocks)
    blocks = [ResidualBlock(hidden_dim, dropout) for _ in range(num_blocks)]
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), *blocks, nn.LayerNorm(hidden_dim), nn.SiLU())


class GaussianHead(nn.Linear):
    """A linear map to the mean and ln σ of a diagonal Gaussian: (B, in_dim) -> DiagGaussian (B, out_dim).

    ln σ is kept inside LOG_STD_RANGE smoothly: one outlying ln σ overflows exp(-2 ln σ) in a KL and ends a run, and a hard
    clamp would stop the gradient that could bring it back.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        check_sizes(in_dim=in_dim, out_dim=out_dim)
        super().__init__(in_dim, 2 * out_dim)

    def forward(self, h: Tensor) -> DiagGaussian:
        """Returns N(mean(h), σ(h)²): h (B, in_dim) -> (B, out_dim)."""
        mean, log_std = super().forward(h).chunk(2, 1)
        return DiagGaussian(mean, soft_clamp(full_precision(log_std), *LOG_STD_RANGE))


class PixelHead(nn.Module):
    """Hidden units to P parameters for each pixel of each channel: (B, in_dim) -> (B, P·C, H, W), parameter-major.

    With P > ``pixel_features`` = K, as for the logits of many levels, each pixel gets K features, and one K x P matrix for all
    pixels turns them into parameters, plus a bias for each pixel. What neighbouring levels have in common is then learned
    once; a full map of in_dim · P · C · H · W weights overfits small sets (DDPM on digits: 2.11 against 1.93 bits/dim) and is
    unaffordable at 256 levels. With P ≤ K it is one linear map.

    Args:
        in_dim: number of hidden units.
        image_shape: (C, H, W).
        params_per_channel: P.
        pixel_features: K.
    """

    def __init__(self, in_dim: int, image_shape: Sequence[int], params_per_channel: int, pixel_features: int) -> None:
        super().__init__()
        check_sizes(params_per_channel=params_per_channel, pixel_features=pixel_features)
        self.shape = (params_per_channel, *image_shape)
        num_features = min(pixel_features, params_per_channel)
        self.features = nn.Linear(in_dim, num_features * math.prod(image_shape))
        self.shared, self.bias = None, None
        if pixel_features < params_per_channel:
            # half of what keeps the variance: logits start small, near a uniform distribution
            self.shared = nn.Parameter(0.5 * torch.randn(params_per_channel, pixel_features) / math.sqrt(pixel_features))
            self.bias = nn.Parameter(torch.zeros(params_per_channel, math.prod(image_shape)))

    def forward(self, h: Tensor) -> Tensor:
        """Returns the parameters: h (B, in_dim) -> (B, P·C, H, W)."""
        return run_in_full_precision(self._params, h)

    def _params(self, h: Tensor) -> Tensor:
        params = self.features(h)
        if self.shared is not None:
            features = params.unflatten(1, (self.shared.shape[1], -1))  # (B, K, C·H·W)
            params = torch.matmul(self.shared, features) + self.bias
        return params.view(-1, self.shape[0] * self.shape[1], *self.shape[2:])


class MLPEncoder(nn.Module):
    """q(z | x): an image to a diagonal Gaussian over a latent vector.

    Args:
        image_shape: (C, H, W).
        latent_dim: width of z.
        hidden_dim: width of the residual blocks.
        num_blocks: number of residual blocks.
        dropout: probability of dropping a hidden unit in each block, in [0, 1).

    Raises:
        ValueError: if a size is not a positive integer.
    """

    def __init__(
        self, image_shape: Sequence[int], latent_dim: int, hidden_dim: int = 256, num_blocks: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_sizes(latent_dim=latent_dim)
        trunk = residual_mlp(math.prod(image_shape), hidden_dim, num_blocks, dropout)
        self.net = nn.Sequential(nn.Flatten(), trunk, GaussianHead(hidden_dim, latent_dim))

    def forward(self, x: Tensor) -> DiagGaussian:
        """Returns q(z | x): x (B, C, H, W) in [-1, 1] -> z (B, latent_dim)."""
        return self.net(x)


class MLPDecoder(nn.Module):
    """p(x | z): a latent vector to the parameters of a pixel likelihood.

    Args:
        image_shape: (C, H, W).
        latent_dim: width of z.
        params_per_channel: P of the :class:`losses.Likelihood`.
        hidden_dim: width of the residual blocks.
        num_blocks: number of residual blocks.
        dropout: probability of dropping a hidden unit in each block, in [0, 1).
        pixel_features: see :class:`PixelHead`.

    Raises:
        ValueError: if a size is not a positive integer.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        latent_dim: int,
        params_per_channel: int,
        hidden_dim: int = 256,
        num_blocks: int = 1,
        dropout: float = 0.0,
        pixel_features: int = 6,
    ) -> None:
        super().__init__()
        check_sizes(latent_dim=latent_dim)
        self.net = nn.Sequential(
            residual_mlp(latent_dim, hidden_dim, num_blocks, dropout),
            PixelHead(hidden_dim, image_shape, params_per_channel, pixel_features),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Returns the likelihood's parameters, parameter-major: z (B, latent_dim) -> (B, P·C, H, W)."""
        return self.net(z)


class MLPDenoiser(nn.Module):
    """The network of DDPM: an image and a step to ``outputs_per_channel`` numbers for each pixel.

    Where the output is one image (the noise, or x_0), x_t times a gain that depends on the step alone is added to it. For
    normal data that is all of the best answer, which normalised hidden units come near only slowly (``data=gaussian``, T = 100,
    50 epochs: 94.6 nats with it, 448 without). Logits of levels have it already: ln q(x_t | level).

    Args:
        image_shape: (C, H, W).
        outputs_per_channel: P of the :class:`diffusion.Parameterization`.
        hidden_dim: width of the residual blocks.
        num_blocks: number of residual blocks.
        dropout: probability of dropping a hidden unit in each block, in [0, 1).
        pixel_features: see :class:`PixelHead`.
        time_dim: width of the time embedding.

    Raises:
        ValueError: if a size is not a positive integer.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        outputs_per_channel: int = 1,
        hidden_dim: int = 512,
        num_blocks: int = 2,
        dropout: float = 0.0,
        pixel_features: int = 6,
        time_dim: int = 64,
    ) -> None:
        super().__init__()
        check_sizes(hidden_dim=hidden_dim)
        check_sizes(MOST_LAYERS, num_blocks=num_blocks)
        check_embedding(time_dim=time_dim)
        self.time_dim = time_dim
        self.time = nn.Sequential(nn.Linear(time_dim, 2 * time_dim), nn.SiLU())
        self.stem = nn.Linear(math.prod(image_shape), hidden_dim)
        self.blocks = nn.ModuleList(ResidualBlock(hidden_dim, dropout, 2 * time_dim) for _ in range(num_blocks))
        self.head = nn.Sequential(
            nn.LayerNorm(hidden_dim), nn.SiLU(), PixelHead(hidden_dim, image_shape, outputs_per_channel, pixel_features)
        )
        self.gain = None
        if outputs_per_channel == 1:
            self.gain = nn.Linear(2 * time_dim, 1)
            nn.init.zeros_(self.gain.weight)
            nn.init.zeros_(self.gain.bias)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns the network's output, parameter-major: x_t (B, C, H, W), t (B,) in 1..T -> (B, P·C, H, W)."""
        condition = self.time(timestep_embedding(t, self.time_dim).to(x_t.dtype))
        h = self.stem(x_t.flatten(1))
        for block in self.blocks:
            h = block(h, condition)
        output = self.head(h)
        return output if self.gain is None else output + run_in_full_precision(self.gain, condition)[..., None, None] * x_t
