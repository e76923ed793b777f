"""The U-Net's training step against other projects' networks: float32, one optimiser for all, the same squared error."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.paired import Row, in_turns
from benchmarks.small_unets import BLOCKS, SHAPE
from networks import UNet

BASE, BATCH = 64, 16
TEXT = "{ours} and {theirs} ms a step"


def unet_step(network: nn.Module, batch: int, call: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Callable[[], None]:
    """Returns one optimiser step on a fixed batch."""
    optimizer = torch.optim.AdamW(network.train().parameters(), lr=1e-4, fused=True)
    x, noise, t = torch.randn(batch, *SHAPE), torch.randn(batch, *SHAPE), torch.randint(1, 1000, (batch,))

    def step() -> None:
        loss = F.mse_loss(call(network, x, t), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def parameters(network: nn.Module) -> int:
    """Returns how many there are."""
    return sum(parameter.numel() for parameter in network.parameters())


def output(network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """Calls a network whose output is the prediction."""
    return network(x, t)


def improved_diffusion(rounds: int, checkout: Path | None) -> list[Row]:
    """Against openai/improved-diffusion, which is on no index: ``checkout`` is where it lies."""
    if checkout is None:
        raise ModuleNotFoundError("give --improved-diffusion=<checkout of openai/improved-diffusion>")
    sys.path.insert(0, str(checkout))
    from improved_diffusion.unet import UNetModel

    theirs = UNetModel(
        in_channels=3, model_channels=BASE, out_channels=3, num_res_blocks=BLOCKS["num_res_blocks"],
        attention_resolutions=(2,), dropout=0.1, channel_mult=BLOCKS["channel_multipliers"], num_heads=1,
    )  # fmt: skip
    return [_equal_blocks(rounds, theirs, output, "openai/improved-diffusion")]


def diffusers(rounds: int) -> list[Row]:
    """Against diffusers' UNet2DModel, as google/ddpm-cifar10-32 configures it."""
    from diffusers import UNet2DModel

    attends = (False, True, False, False)
    theirs = UNet2DModel(
        sample_size=32, block_out_channels=[BASE * m for m in BLOCKS["channel_multipliers"]], layers_per_block=2,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, dropout=0.1,
    )  # fmt: skip
    return [_equal_blocks(rounds, theirs, lambda network, x, t: network(x, t).sample, "diffusers UNet2DModel")]


def _equal_blocks(rounds: int, theirs: nn.Module, call: Callable, name: str) -> Row:
    ours = UNet(SHAPE, base_channels=BASE, dropout=0.1, **BLOCKS)
    if parameters(ours) != parameters(theirs):
        raise ValueError(f"{name} has {parameters(theirs)} parameters, ours {parameters(ours)}: the networks are not equal")
    pairs = in_turns(unet_step(ours, BATCH, output), unet_step(theirs, BATCH, call), rounds)
    return pairs.row(f"U-Net training step, {parameters(ours):,} parameters, batch {BATCH}", name, 1.05, False, TEXT)


def lucidrains(rounds: int) -> list[Row]:
    """Against denoising-diffusion-pytorch's Unet(dim=32, dim_mults=(1, 2, 2, 2)), which differs in its blocks.

    It has linear attention at every level and full attention at the last; ours has full attention at 16x16, and in the last row
    at the last level, as theirs.
    """
    if find_spec("denoising_diffusion_pytorch") is None:
        raise ModuleNotFoundError("pip install -e '.[bench]'")
    from denoising_diffusion_pytorch import Unet

    theirs = Unet(dim=32, dim_mults=BLOCKS["channel_multipliers"])
    rows = []
    for height, batch in ((16, BATCH), (16, 4 * BATCH), (4, BATCH)):
        ours = UNet(SHAPE, base_channels=32, dropout=0.0, **{**BLOCKS, "attention_resolutions": (height,)})
        pairs = in_turns(unet_step(ours, batch, output), unet_step(theirs, batch, output), rounds)
        against = f"denoising-diffusion-pytorch, dim 32 ({parameters(theirs):,})"
        name = f"U-Net training step, {parameters(ours):,} parameters, batch {batch}, attention at {height}x{height}"
        rows.append(pairs.row(name, against, 1.4, False, TEXT))
    return rows


def benches(checkout: Path | None) -> dict[str, Callable[[int], list[Row]]]:
    """Returns the comparisons by name."""
    return {
        "unet-improved-diffusion": partial(improved_diffusion, checkout=checkout),
        "unet-diffusers": diffusers,
        "unet-lucidrains": lucidrains,
    }
