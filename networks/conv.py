"""Convolutional encoder and decoder of a VAE: images of any size, halved with the odd pixel rounded up."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from losses import DiagGaussian
from losses.gaussian import full_precision
from networks.layers import ResBlock, group_norm, run_in_full_precision, soft_clamp

# ln σ of q(z | x). Priors have σ near 1: e^-7 already spends 7 nats a dimension on precision, and e^3 covers the prior twenty
# times over, so no useful posterior is cut off, while σ² and the KL stay finite in the first steps and when β = 0.
LOG_STD_RANGE = (-7.0, 3.0)


def _check(name: str, image_shape: Sequence[int], latent_dim: int, channels: Sequence[int]) -> None:
    if not channels or min(*channels, *image_shape, latent_dim) < 1:
        raise ValueError(
            f"{name} needs at least one entry in channels, all of them and latent_dim positive, got channels={list(channels)}, "
            f"latent_dim={latent_dim} and image_shape={list(image_shape)}"
        )


def _halvings(image_shape: Sequence[int], num: int) -> list[tuple[int, int]]:
    """Returns (H, W) before and after each of ``num`` halvings: num + 1 sizes."""
    sizes = [(image_shape[1], image_shape[2])]
    for _ in range(num):
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return sizes


class ConvEncoder(nn.Module):
    """x -> q(z | x): strided convolutions and residual blocks, then one linear layer.

    Args:
        image_shape: (C, H, W).
        latent_dim: number of dimensions of z.
        channels: width after each halving, one halving each.
        dropout: probability in the residual blocks, in [0, 1).

    Raises:
        ValueError: if there are no channels, or a size is not positive.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        latent_dim: int,
        channels: Sequence[int] = (32, 64, 128),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check("ConvEncoder", image_shape, latent_dim, channels)
        layers: list[nn.Module] = []
        for before, width in zip([image_shape[0], *channels], channels, strict=False):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), ResBlock(width, width, dropout)]
        height, width = _halvings(image_shape, len(channels))[-1]
        self.features = nn.Sequential(*layers, group_norm(channels[-1]), nn.SiLU(), nn.Flatten())
        self.head = nn.Linear(channels[-1] * height * width, 2 * latent_dim)

    def forward(self, x: Tensor) -> DiagGaussian:
        """Returns q(z | x) over (B, latent_dim): x (B, C, H, W) in [-1, 1]."""
        mean, log_std = full_precision(self.head(self.features(x))).chunk(2, dim=1)
        return DiagGaussian(mean, soft_clamp(log_std, *LOG_STD_RANGE))


class ConvDecoder(nn.Module):
    """z -> P parameters for each pixel of each channel: the encoder's sizes backwards, each reached from the nearest pixels.

    Args:
        image_shape: (C, H, W).
        latent_dim: number of dimensions of z.
        params_per_channel: P.
        channels: width before each doubling, one doubling each; a residual block follows each doubling.
        dropout: probability in the residual blocks, in [0, 1).

    Raises:
        ValueError: if there are no channels, or a size is not positive.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        latent_dim: int,
        params_per_channel: int,
        channels: Sequence[int] = (128, 64, 32),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check("ConvDecoder", image_shape, latent_dim, channels)
        (height, width), *self.sizes = reversed(_halvings(image_shape, len(channels)))
        self.stem = nn.Sequential(
            nn.Linear(latent_dim, channels[0] * height * width), nn.Unflatten(1, (channels[0], height, width))
        )
        after = [*channels[1:], channels[-1]]
        self.blocks = nn.ModuleList(ResBlock(c_in, c_out, dropout) for c_in, c_out in zip(channels, after, strict=True))
        out = nn.Conv2d(channels[-1], params_per_channel * image_shape[0], 3, padding=1)
        self.head = nn.Sequential(group_norm(channels[-1]), nn.SiLU(), out)
        # Near zero the untrained likelihood is broad and finite; not quite zero, so that z is heard from the first step.
        nn.init.normal_(out.weight, std=1e-3)
        nn.init.zeros_(out.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Returns the parameters, parameter-major: z (B, latent_dim) -> (B, P·C, H, W)."""
        h = self.stem(z)
        for size, block in zip(self.sizes, self.blocks, strict=True):
            h = block(F.interpolate(h, size=size, mode="nearest"))
        return run_in_full_precision(self.head, h)
