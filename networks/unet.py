r"""The U-Net of Ho et al. (2020), "Denoising Diffusion Probabilistic Models", appendix B and its published code.

Level l works at H/2^l x W/2^l with base_channels · multiplier_l channels. On the way down each level has R residual blocks and,
but for the last, a strided convolution; every output is kept. On the way up it has R + 1 blocks, each fed with one kept output
concatenated. Some resolutions and the middle have self-attention. The time t enters every residual block. The CIFAR-10
setting has 35 746 307 parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from losses.checks import MOST_LAYERS, is_whole
from networks.layers import ResBlock, check_embedding, group_norm, run_in_full_precision, timestep_embedding, zeroed


class UNet(nn.Module):
    """(x_t, t) -> P parameters for each pixel of each channel, all of them zero before training.

    Args:
        image_shape: (C, H, W); H and W must be multiples of 2^(number of levels - 1).
        outputs_per_channel: P, how many numbers each pixel of each channel gets.
        base_channels: width of the first level.
        channel_multipliers: width of each level as a multiple of ``base_channels``; one level each.
        num_res_blocks: R, residual blocks of a level on the way down.
        attention_resolutions: heights H/2^l at which every residual block is followed by self-attention.
        dropout: probability in the residual blocks, in [0, 1).
        num_heads: heads of the self-attention.
        checkpoint_activations: whether training keeps only what goes into each block, and runs the block again in the
            backward pass: less memory for a third more computation, the same gradients.

    Raises:
        ValueError: if the image does not halve often enough, or a setting makes no network.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        outputs_per_channel: int = 1,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        num_heads: int = 1,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        counts = {"outputs_per_channel": outputs_per_channel, "base_channels": base_channels, "num_heads": num_heads}
        check_embedding(base_channels=base_channels)
        _check_counts(counts | {"num_res_blocks": num_res_blocks}, channel_multipliers)
        heights = _check_sizes(image_shape, channel_multipliers, attention_resolutions)
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        attended = [height in attention_resolutions for height in heights]
        _check_heads(num_heads, {width for width, attends in zip(widths, attended, strict=True) if attends} | {widths[-1]})

        def block(in_channels: int, width: int, attends: bool) -> Block:
            return Block(in_channels, width, 4 * base_channels, dropout, num_heads if attends else 0)

        self.base_channels, self.checkpoint_activations = base_channels, checkpoint_activations
        self.time = nn.Sequential(
            nn.Linear(base_channels, 4 * base_channels),
            nn.SiLU(),
            nn.Linear(4 * base_channels, 4 * base_channels),
            nn.SiLU(),  # every block would begin with it: done once for all
        )
        self.stem = nn.Conv2d(image_shape[0], base_channels, 3, padding=1)
        self.down, kept = _way_down(block, base_channels, widths, attended, num_res_blocks)
        self.middle = nn.ModuleList([block(widths[-1], widths[-1], True), block(widths[-1], widths[-1], False)])
        self.up = _way_up(block, kept, widths, attended, num_res_blocks)
        out_channels = outputs_per_channel * image_shape[0]
        self.head = nn.Sequential(group_norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], out_channels, 3, padding=1))
        self._initialise()

    def _initialise(self) -> None:
        # Theirs: uniform with variance 1/mean(fan_in, fan_out), zero biases, and zeros at the end of every residual branch.
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResBlock):
                zeroed(module.conv2)
            elif isinstance(module, SelfAttention):
                module.initialise()
        zeroed(self.head[-1])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the parameters, parameter-major: ``out.unflatten(1, (P, C))`` separates them.

        Args:
            x: (B, C, H, W), about [-1, 1].
            t: (B,) int64, in 1..T.

        Returns:
            (B, P·C, H, W).
        """
        time = self.time(timestep_embedding(t - 1, self.base_channels).to(x.dtype))  # they count steps 0..T-1
        h = self.stem(x)
        kept = [h]
        for module in self.down:
            h = self._run(module, time, h)
            kept.append(h)
        for module in self.middle:
            h = self._run(module, time, h)
        for module in self.up:
            h = self._run(module, time, h) if isinstance(module, Upsample) else self._run(module, time, h, kept.pop())
        return run_in_full_precision(self.head, h)

    def _run(self, module: nn.Module, time: Tensor, *parts: Tensor) -> Tensor:
        """Runs a block on its parts, concatenated, and forgets what happens inside if activations are checkpointed."""

        def run(time: Tensor, *parts: Tensor) -> Tensor:
            return module(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], time)

        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(run, time, *parts, use_reentrant=False)  # with the same random numbers when it runs again
        return run(time, *parts)


class Block(nn.Module):
    """A residual block, followed by self-attention where ``num_heads`` > 0."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, dropout: float, num_heads: int) -> None:
        super().__init__()
        self.residual = ResBlock(in_channels, out_channels, dropout, time_dim)
        self.attention = SelfAttention(out_channels, num_heads) if num_heads else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, C_in, H, W), (B, time_dim) -> (B, C_out, H, W)."""
        return self.attention(self.residual(x, time))


class SelfAttention(nn.Module):
    """Attention between all pixels, added to the input: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def initialise(self) -> None:
        """Starts q, k and v as three layers of their own, and the branch as zero."""
        for weight in self.qkv.weight.data.chunk(3):
            nn.init.xavier_uniform_(weight)
        zeroed(self.out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.num_heads, -1))  # (B, 3, heads, d, N)
        # contiguous: given a transposed view, scaled_dot_product_attention silently takes a slow kernel
        q, k, v = qkv.permute(1, 0, 2, 4, 3).contiguous().unbind()  # (B, heads, N, d) each
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(attended.transpose(2, 3).reshape(x.shape))


class Downsample(nn.Conv2d):
    """Halves height and width by a strided convolution, padded at the bottom and on the right only, as theirs is."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Doubles height and width: the nearest pixel, then a 3x3 convolution with this layer's weight.

    Worked out as the transposed convolution that the two make together. Of the nine pixels under the kernel several are copies
    of one, so it needs 16 products for a pixel of the input instead of 36, and never holds the enlarged image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        kernel = self.weight.flip(2, 3).transpose(0, 1)
        kernel = F.pad(kernel, (0, 0, 0, 1)) + F.pad(kernel, (0, 0, 1, 0))  # each pixel is met in two rows
        kernel = F.pad(kernel, (0, 1)) + F.pad(kernel, (1, 0))  # and in two columns: (C, C, 4, 4)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


def _way_down(block, channels: int, widths: list[int], attended: list[bool], num: int) -> tuple[nn.ModuleList, list[int]]:
    """Returns the modules and the widths of the outputs that are kept, the stem's first."""
    modules, kept = nn.ModuleList(), [channels]
    for level, width in enumerate(widths):
        if level:
            modules.append(Downsample(channels))
            kept.append(channels)
        for _ in range(num):
            modules.append(block(channels, width, attended[level]))
            channels = width
            kept.append(channels)
    return modules, kept


def _way_up(block, kept: list[int], widths: list[int], attended: list[bool], num: int) -> nn.ModuleList:
    """Returns the modules: at every level one block more than on the way down, then, but for the first level, the doubling."""
    modules, channels = nn.ModuleList(), widths[-1]
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(num + 1):
            modules.append(block(channels + kept.pop(), width, attended[level]))
            channels = width
        if level:
            modules.append(Upsample(channels))
    return modules


def _check_counts(counts: dict[str, int], channel_multipliers: Sequence[int]) -> None:
    for name, value in counts.items():
        if not is_whole(value, 1, MOST_LAYERS):
            raise ValueError(f"{name} of the U-Net must be an integer of at least 1 and at most {MOST_LAYERS}, got {value!r}")
    if not channel_multipliers or min(channel_multipliers) < 1:
        raise ValueError(f"channel_multipliers must be positive integers, one for each level, got {list(channel_multipliers)}")


def _check_sizes(image_shape: Sequence[int], multipliers: Sequence[int], attention: Sequence[int]) -> list[int]:
    """Returns the height of each level."""
    _, height, width = image_shape
    factor = 2 ** (len(multipliers) - 1)
    if height % factor or width % factor:
        raise ValueError(
            f"an image of {height}x{width} does not halve {len(multipliers) - 1} times, as channel_multipliers="
            f"{list(multipliers)} asks: give fewer of them, or an image whose sides are multiples of {factor}"
        )
    heights = [height >> level for level in range(len(multipliers))]
    if missing := [resolution for resolution in attention if resolution not in heights]:
        raise ValueError(
            f"attention_resolutions={list(attention)}: {missing} never occurs in an image of {height}x{width} with "
            f"channel_multipliers={list(multipliers)}, choose among {heights}"
        )
    return heights


def _check_heads(num_heads: int, widths: set[int]) -> None:
    if any(width % num_heads for width in widths):
        raise ValueError(f"num_heads={num_heads} does not divide the {sorted(widths)} channels that self-attention works on")
