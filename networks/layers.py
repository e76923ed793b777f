"""Layers that several networks share: dropout for ranks that share a batch, time embedding, residual block, soft clamp."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses import draws
from losses.checks import is_whole
from losses.gaussian import full_precision


class Dropout(nn.Module):
    """``nn.Dropout`` whose mask is this rank's rows of the global batch's mask, so N devices drop what one device drops.

    Args:
        p: probability that an entry is zeroed, in [0, 1).

    Raises:
        ValueError: if ``p`` lies outside [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout must be a probability in [0, 1), got {p!r}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Zeroes entries and scales the others by 1/(1 - p) in training, does nothing in evaluation: (B, *) -> (B, *)."""
        return draws.dropout(x, self.p) if self.training and self.p > 0 else x

    def extra_repr(self) -> str:
        """Shows p in the printed module."""
        return f"p={self.p}"


def check_embedding(**dim: int) -> None:
    """Refuses an embedding of t without a sine and a cosine, which would be 0 whatever t is.

    Raises:
        ValueError: naming the size.
    """
    ((name, size),) = dim.items()
    if not is_whole(size, 2):
        raise ValueError(f"{name} must be an integer of at least 2, got {size!r}: the network could not tell steps apart")


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Returns (sin t·ω_i, cos t·ω_i) with ω_i falling geometrically from 1 to 1/max_period: (B,) -> (B, dim) float32.

    The form of Ho et al. (2020): i = 0..dim/2 - 1 includes both ends; an odd ``dim`` ends with a zero.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) / max(half - 1, 1) * steps)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def soft_clamp(x: Tensor, low: float, high: float) -> Tensor:
    """Squeezes ``x`` smoothly into (low, high + e^(low - high)): the identity in the middle, a gradient everywhere."""
    return low + F.softplus(high - F.softplus(high - x) - low)


def run_in_full_precision(head: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """Returns ``head(h)`` outside of mixed precision, in float32 (TF32 where that is asked for) or better.

    For what ends a network with an image's parameters. bfloat16 has eight bits: as the last rounding of x̂_0, or of a mean, it
    costs up to 0.1 bits/dim where the likelihood is sharp, however well the network is trained.
    """
    if h.is_meta or not torch.is_autocast_enabled(h.device.type):  # where nothing is computed there is no autocast to ask for
        return head(h)
    with torch.autocast(h.device.type, enabled=False):
        return head(full_precision(h))


def group_norm(channels: int) -> nn.GroupNorm:
    """Returns GroupNorm with 32 groups (Ho et al. 2020), or fewer where they would hold less than four channels each.

    A group of one channel would subtract whatever is added to the whole of that channel, so the time would go unheard in a
    block of 32 channels with 32 groups. Their narrowest group, of 128 channels, has four.
    """
    most = 1 << max(channels // 4, 1).bit_length() - 1  # the greatest power of two that leaves four in a group
    return nn.GroupNorm(math.gcd(32, channels, most), channels, eps=1e-6)


def zeroed(module: nn.Module) -> nn.Module:
    """Sets every parameter to zero and returns the module: a residual branch that ends so starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    """GroupNorm-SiLU-Conv (+ time) GroupNorm-SiLU-Dropout-Conv, added to the input: (B, C_in, H, W) -> (B, C_out, H, W).

    Args:
        in_channels: C_in.
        out_channels: C_out; when it differs from C_in the shortcut is a 1x1 convolution.
        dropout: probability in [0, 1).
        time_dim: size of the time features, or 0 for a block that knows no time.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0, time_dim: int = 0) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, out_channels) if time_dim else None
        self.norm2 = group_norm(out_channels)
        self.dropout = Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """Adds the block's branch to x (B, C_in, H, W), given time features (B, time_dim), activated: (B, C_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time is not None:
            h = h + self.time(time)[:, :, None, None]
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))
