"""The steps whose growth is measured: one quantity grows at a time, everything else stays."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.counting import saved_bytes
from benchmarks.jobs import configure
from diffusion import Epsilon, cosine, simple
from lightning_modules import DDPMLightningModule, LikelihoodModule
from networks import MLPDenoiser, UNet
from runs.build import build_part


class TrainingStep:
    """Forward and backward pass and a fused Adam step on random images.

    Args:
        model: to be trained.
        batch: images of a step.
    """

    def __init__(self, model: LikelihoodModule, batch: int) -> None:
        self.model = model.train()
        self.images = torch.randint(model.levels, (batch, *model.image_shape)).to(torch.uint8)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, fused=True)

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def __call__(self) -> None:
        """Does one step."""
        self.optimizer.zero_grad()
        self.model.objective(self.images)[0].backward()
        self.optimizer.step()

    def kept(self) -> int:
        """Bytes that are kept for the backward pass, parameters left out."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a batch with a t = 1 in it takes some operations more
            return saved_bytes(lambda: self.model.objective(self.images), self.model.parameters())

    def memory(self) -> int:
        """Bytes of parameters, gradients, Adam's two moments, and what is kept for the backward pass."""
        return self.kept() + 4 * sum(parameter.nbytes for parameter in self.model.parameters())


class Loop:
    """T calls of a small network without gradients: the exact bound of 8 images, or 8 samples."""

    def __init__(self, num_steps: int, run: Callable[[DDPMLightningModule, torch.Tensor], object]) -> None:
        network = partial(MLPDenoiser, hidden_dim=128)
        self.model = DDPMLightningModule(network, cosine, num_steps, Epsilon(), image_shape=(1, 8, 8), levels=17).eval()
        self.images = torch.randint(17, (8, 1, 8, 8)).to(torch.uint8)
        self.run = run

    @torch.inference_mode()
    def __call__(self) -> None:
        """Runs the loop once."""
        self.run(self.model, self.images)


@dataclass(frozen=True)
class Series:
    """One quantity that grows.

    Attributes:
        name: of the panel and the row.
        label: of the quantity.
        what: is held fixed.
        values: of the setting that is changed.
        build: value -> step.
        abscissa: (step, value) -> the quantity, where it is not the setting itself.
    """

    name: str
    label: str
    what: str
    values: Sequence[int]
    build: Callable[[int], Any]
    abscissa: Callable[[Any, int], float] = lambda _, value: value


def ddpm(side: int = 32, width: int = 32, blocks: int = 1, num_steps: int = 1000) -> DDPMLightningModule:
    """Returns a DDPM with a U-Net of two levels, which attends at half its height."""
    network = partial(
        UNet, base_channels=width, channel_multipliers=(1, 2), num_res_blocks=blocks, attention_resolutions=(side // 2,)
    )
    sizes = {"image_shape": (3, side, side), "levels": 256}
    return DDPMLightningModule(network, cosine, num_steps, Epsilon(), weighting=simple, **sizes)


def mhvae(depth: int) -> LikelihoodModule:
    """Returns digits' MHVAE with ``depth`` latents."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = configure(Path(folder), "model=mhvae", f"model.depth={depth}")
    return build_part(cfg.model)


def all_series(quick: bool) -> list[Series]:
    """Returns what is measured in one process; ``quick`` leaves two small values of each."""
    unet = "U-Net of two levels"
    series = [
        Series("batch", "images", f"{unet}, width 32, 3x16x16", (1, 2, 4, 8, 16, 32, 64, 128),
               lambda n: TrainingStep(ddpm(16), n)),
        Series("resolution", "pixels (height x width)", f"{unet}, width 16, batch 4", (8, 16, 24, 32, 48, 64, 96),
               lambda n: TrainingStep(ddpm(n, 16), 4), lambda _, side: side * side),
        Series("parameters", "parameters, by width", f"{unet}, 3x16x16, batch 16", (16, 32, 64, 96, 128, 192),
               lambda n: TrainingStep(ddpm(16, n), 16), lambda step, _: step.parameters),
        Series("U-Net blocks", "residual blocks a level", f"{unet}, width 16, 3x16x16, batch 16", (1, 2, 4, 8, 12, 16),
               lambda n: TrainingStep(ddpm(16, 16, n), 16)),
        Series("MHVAE depth", "T", "MHVAE of digits, batch 128", (1, 2, 4, 8, 16, 32),
               lambda n: TrainingStep(mhvae(n), 128)),
        Series("diffusion steps, training", "T", f"{unet}, width 32, 3x16x16, batch 16", (8, 32, 128, 512, 2048),
               lambda n: TrainingStep(ddpm(16, num_steps=n), 16)),
        Series("diffusion steps, exact bound", "T", "MLP, 8 images 1x8x8", (16, 64, 256, 1024, 4096),
               lambda n: Loop(n, lambda model, x: model.elbo(x))),
        Series("diffusion steps, sampling", "T", "MLP, 8 images 1x8x8", (16, 64, 256, 1024, 4096),
               lambda n: Loop(n, lambda model, x: model.sample(len(x)))),
    ]  # fmt: skip
    if quick:
        series = [Series(s.name, s.label, s.what, s.values[:2], s.build, s.abscissa) for s in series]
    return series
