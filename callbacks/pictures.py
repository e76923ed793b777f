"""Pictures of a run, as PNG files and in W&B: samples, reconstructions, and the KL of each step or level."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from callbacks.checkpoints import tested_step
from callbacks.files import whole
from datamodules import ImageDataModule
from lightning_modules import LatentModule
from losses.elbo import nats_to_bits_per_dim

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

BLUE, ORANGE = "#3b6fb6", "#c2541b"
PROFILE_IMAGES = 64


class Pictures(Callback):
    """Draws samples during training and, at its end, the pictures that explain the bound.

    Args:
        directory: the run directory; ``samples/`` and ``plots/`` are made in it.
        every_n_epochs: epochs between two grids of samples, which are drawn in validations on such an epoch; 0 draws none
            during training.
        num: images in a grid.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, directory: str, every_n_epochs: int = 50, num: int = 64) -> None:
        if every_n_epochs < 0 or num < 1:
            raise ValueError(
                f"callbacks.pictures.every_n_epochs={every_n_epochs} must be at least 0, pictures.num={num} at least 1"
            )
        self.directory, self.every_n_epochs, self.num = Path(directory), every_n_epochs, num
        self._tested: list[Tensor] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws samples with the weights that validation used."""
        due = self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if due and not trainer.sanity_checking and trainer.is_global_zero:
            with fixed_draws(pl_module.device), torch.inference_mode():  # the grids show learning, not luck
                self._samples(trainer, pl_module, f"step_{trainer.global_step:07d}", trainer.global_step)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the images of an earlier test."""
        self._tested = []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keeps the first images of a loader of one's own, which may be read but once."""
        missing = PROFILE_IMAGES - sum(map(len, self._tested))
        if missing > 0 and _data_module(trainer) is None:
            self._tested.append(batch[:missing])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the final samples, reconstructions and the KL profile with the tested weights."""
        if not trainer.is_global_zero:
            return
        with fixed_draws(pl_module.device), torch.inference_mode():
            self._samples(trainer, pl_module, "final", tested_step(trainer))
            x = self._images(trainer).to(pl_module.device)
            if isinstance(pl_module, LatentModule) and pl_module.levels is not None:
                self._reconstructions(trainer, pl_module, x[: max(1, self.num // 2)])
            self._profile(trainer, pl_module, x)

    def _images(self, trainer: Trainer) -> Tensor:
        """Returns the first test images, of a data module of this framework the same on however many ranks."""
        data = _data_module(trainer)
        if data is None:
            return torch.cat(self._tested)
        return data.scored("test").index_select(0, torch.arange(min(PROFILE_IMAGES, data.sizes["test"])))

    def _samples(self, trainer: Trainer, module: LightningModule, name: str, step: int) -> None:
        mean = module.levels is not None
        caption = f"Samples{f': {what_means_are(module.levels)} p(x | z₁)' * mean} after {step} steps"
        figure = plot_samples(module.sample(self.num, mean=mean), module.levels, caption)
        self._save(trainer, figure, f"samples/{name}.png", "samples", caption)

    def _reconstructions(self, trainer: Trainer, module: LightningModule, x: Tensor) -> None:
        pairs = torch.stack([x, module.reconstruct(x)], 1).flatten(0, 1)
        caption = f"Test images (odd columns), to the right of each {what_means_are(module.levels)} its p(x | z₁)"
        figure = plot_grid(pairs, module.levels, caption, columns=2 * math.ceil(math.sqrt(len(pairs)) / 2))
        self._save(trainer, figure, "plots/reconstructions.png", "reconstructions", caption)

    def _profile(self, trainer: Trainer, module: LightningModule, x: Tensor) -> None:
        kls = module.latent_kls(x).mean(1).cpu()
        self._table(trainer, kls)
        unit = module.unit
        values = kls if module.levels is None else nats_to_bits_per_dim(kls, module.num_dims)
        what = "ln q/p" if module.consistency else "KL"
        total = f"sum {values.sum():.3f} {unit}"
        last = len(values)
        latents = f"z_1..z_{last - 1}, and KL of z_{last}" if module.consistency else f"each latent z_1..z_{last}"
        caption = f"{what} of {latents}, mean of {len(x)} test images, {unit}; {total}"
        figure = plot_profile(values.numpy(), unit, caption, what)
        self._save(trainer, figure, "plots/kl_per_level.png", "kl_per_level", caption)

    def _table(self, trainer: Trainer, kls: Tensor) -> None:
        """Writes the numbers behind the profile, for runs to be laid over each other: t and nats, as a file and in W&B."""
        rows = list(enumerate(kls.tolist(), start=1))
        text = "\n".join(["t,nats", *(f"{t},{value:.9g}" for t, value in rows), ""])
        with whole(self.directory / "plots" / "kl_per_level.csv") as draft:
            draft.write_text(text)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("profile/kl_per_level", ["t", "nats"], [list(row) for row in rows], step=trainer.global_step)

    def _save(self, trainer: Trainer, figure: plt.Figure, path: str, key: str, caption: str) -> None:
        target = self.directory / path
        with whole(target) as draft:
            figure.savefig(draft, dpi=140, format="png")
        plt.close(figure)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(f"pictures/{key}", [str(target)], step=trainer.global_step, caption=[caption])


def what_means_are(levels: int) -> str:
    """Returns what the level nearest to a mean is called: of two levels, the one that is likelier."""
    return "most likely values of" if levels == 2 else "means of"


def _data_module(trainer: Trainer) -> ImageDataModule | None:
    """Returns what the test reads, if it is a data module of this framework."""
    source = trainer.test_loop._data_source.instance  # trainer.datamodule may be of a fit before
    return source if isinstance(source, ImageDataModule) else None


@contextmanager
def fixed_draws(device: torch.device) -> Iterator[None]:
    """Draws the same numbers each time inside; outside everything goes on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def grid(images: Tensor, levels: int, columns: int) -> np.ndarray:
    """Lays images (N, C, H, W) uint8 out in rows of ``columns``: (height, width, 3 or none), values 0 to 1."""
    rows = math.ceil(len(images) / columns)
    channels, height, width = images.shape[1:]
    gap = max(1, height // 8)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 0.5)
    for index, image in enumerate(images.cpu().numpy() / (levels - 1)):
        row, column = divmod(index, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    # matplotlib shows one channel by a colour map and three as they are; other numbers of channels by their mean
    return canvas if channels == 3 else canvas.mean(2)


def plot_grid(images: Tensor, levels: int, caption: str, columns: int | None = None) -> plt.Figure:
    """Returns a figure of images (N, C, H, W) uint8 in a grid, with its caption above."""
    canvas = grid(images, levels, columns or math.ceil(math.sqrt(len(images))))
    size = 5.0
    figure, axis = plt.subplots(figsize=(size, size * canvas.shape[0] / canvas.shape[1] + 0.45), layout="constrained")
    axis.imshow(canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_axis_off()
    axis.set_title(caption, fontsize=8, wrap=True)
    return figure


def plot_samples(samples: Tensor, levels: int | None, caption: str) -> plt.Figure:
    """Returns a figure of samples (N, C, H, W): a grid of images, or how often continuous values come up."""
    if levels is not None:
        return plot_grid(samples, levels, caption)
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    axis.hist(samples.flatten().cpu().numpy(), bins=40, density=True, color=BLUE)
    axis.set(xlabel="x (data units)", ylabel="density")
    axis.set_title(caption, fontsize=8, wrap=True)
    return figure


def label_decades(axis: Axis) -> None:
    """Labels a logarithmic axis by 1, 2 and 5 where it spans few decades, by powers of ten where it spans many."""
    low, high = axis.get_view_interval()
    if high < 300 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def plot_profile(values: np.ndarray, unit: str, caption: str, what: str = "KL") -> plt.Figure:
    """Returns a figure of what each latent costs: bars for a few, a curve with its sum from the top for many."""
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    t = np.arange(1, len(values) + 1)
    if len(values) <= 12:
        bars = axis.bar(t, values, color=BLUE, width=0.6)
        axis.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
        axis.margins(y=0.15)
        axis.set_xticks(t)
        axis.axhline(0, color="black", linewidth=0.8)
    else:
        signed = bool((values < 0).any())  # as log ratios of a drawn chain may be
        label = f"{what} of one step (left{'' if signed else ', log scale'})"
        axis.plot(t, values if signed else np.clip(values, 1e-9, None), color=BLUE, label=label)
        if signed:
            axis.axhline(0, color="black", linewidth=0.8)
        else:
            axis.set_yscale("log")
            label_decades(axis.yaxis)
        axis.xaxis.set_major_locator(MaxNLocator(steps=(1, 2, 5, 10), integer=True))
        total = axis.twinx()
        sums = values[::-1].cumsum()[::-1]
        total.plot(t, sums, color=ORANGE, label="sum of all steps from here up (right)")
        total.set(ylabel=unit, ylim=(min(0, 1.05 * sums.min()), None))
        figure.legend(fontsize=8, ncols=2, loc="outside upper center")  # on a curve it would hide some of it
    axis.set(xlabel="t: the latent z_t (x_t in DDPM); the last is the prior term", ylabel=unit)
    axis.set_title(caption, fontsize=8)
    return figure
