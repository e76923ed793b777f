"""Pictures of where the bits go."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from torch import Tensor

from callbacks.pictures import BLUE, ORANGE, grid, label_decades
from datamodules.base import Images
from evaluation.balance import ACTIVE, LatentBalance
from evaluation.profile import StepMoments, rate_and_distortion
from losses.elbo import nats_to_bits_per_dim

SHOWN = 8  # images at each end of the histogram


def _measured(moments: StepMoments) -> str:
    """Says at which steps, and whether what is drawn between them, and in sums, is interpolated."""
    every = len(moments.means)
    at = "every step" if moments.num_steps == every else f"{moments.num_steps} of {every} steps, interpolated between,"
    return f"measured at {at} on {moments.num_images} images"


def plot_steps(moments: StepMoments, num_dims: int, unit: str) -> plt.Figure:
    """Returns a figure of the KL of each step over log t, with the sum from t = T down."""
    scale = nats_to_bits_per_dim(1.0, num_dims) if unit == "bits/dim" else 1.0
    kls = moments.means.numpy() * scale
    t = np.arange(2, len(kls) + 2)
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    axis.loglog(t, np.clip(kls, 1e-12, None), color=BLUE, label="KL of one step (left)", marker="." if len(t) < 20 else None)
    axis.set(xlabel="step t", ylabel=f"KL of one step ({unit})")
    label_decades(axis.xaxis)
    if len(t) < 10:
        axis.set_xticks(t)
    label_decades(axis.yaxis)
    total = axis.twinx()
    total.plot(t, kls[::-1].cumsum()[::-1] + moments.prior * scale, color=ORANGE, label="cumulated from t = T down (right)")
    total.set(ylabel=f"prior and all steps from T down to t ({unit})", ylim=(0, None))
    figure.legend(fontsize=8, ncols=2, loc="outside upper center")  # on a curve it would hide some of it
    axis.set_title(f"KL of each step, {_measured(moments)}", fontsize=9)
    return figure


def plot_rate_distortion(moments: StepMoments, num_dims: int, levels: int) -> plt.Figure:
    """Returns a figure of the distortion of x̂_0 at t against the rate sent by then (Ho et al. 2020, figure 5)."""
    rate, distortion = (part.numpy() for part in rate_and_distortion(moments, num_dims, levels))
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.2), layout="constrained")
    done = 1 - np.arange(2, len(rate) + 2) / (len(rate) + 1)
    label = f"RMSE of x̂₀ (levels 0..{levels - 1})"
    for axis, (x, y, xlabel, ylabel) in zip(
        axes,
        [
            (done, distortion, "reverse steps (1 − t/T)", label),
            (done, rate, "reverse steps (1 − t/T)", "rate (bits/dim)"),
            (rate, distortion, "rate (bits/dim)", label),
        ],
        strict=True,
    ):
        axis.plot(x, y, color=BLUE)
        axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    figure.suptitle(f"Progressive coding: rate and distortion along the reverse chain, {_measured(moments)}", fontsize=9)
    return figure


def plot_units(latents: Sequence[LatentBalance], cost: str) -> plt.Figure:
    """Returns a figure of the cost (KL or ln q/p) of each latent unit, sorted, one panel a latent; grey ones are not active."""
    columns = min(len(latents), 4)
    rows = math.ceil(len(latents) / columns)
    size = (max(5.0, 3.6 * columns), 0.4 + 3.0 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axis in axes.flat[len(latents) :]:
        axis.set_axis_off()
    for number, (axis, latent) in enumerate(zip(axes.flat, latents, strict=False), start=1):
        order = latent.kl.argsort(descending=True)
        colours = [BLUE if active else "0.75" for active in (latent.mean_variance[order] > ACTIVE).tolist()]
        axis.bar(np.arange(1, len(order) + 1), latent.kl[order].numpy(), color=colours)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlabel=f"unit of z_{number}, sorted")
        axis.set_title(f"z_{number}: {latent.active} of {len(order)} units active, {latent.kl.sum():.2f} nats", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel(f"{cost} (nats)")
    last = f"; KL of the last latent's, z_{len(latents)}" if cost != "KL" else ""
    figure.suptitle(f"{cost} of each latent unit{last}; grey: not active", fontsize=9)
    return figure


def plot_images(bits: Tensor, images: Images, places: Tensor, levels: int, split: str) -> plt.Figure:
    """Returns a histogram of images' bits/dim, with the cheapest and the dearest images.

    Args:
        bits: of each image, (N,).
        images: the split, of which those that are shown are read.
        places: where in it each image is, (N,).
        levels: number of values that a pixel takes.
        split: its name.
    """
    order, shown = bits.argsort(), min(SHOWN, max(1, len(bits) // 2))
    figure, axes = plt.subplots(1, 3, figsize=(10.4, 3.4), width_ratios=[1.5, 1, 1], layout="constrained")
    axes[0].hist(bits.numpy(), bins=min(40, max(8, int(math.sqrt(len(bits)) * 2))), color=BLUE)
    axes[0].axvline(bits.mean().item(), color=ORANGE, label=f"mean {bits.mean():.3f}")
    axes[0].set(xlabel="bits/dim of one image", ylabel="images")
    axes[0].legend(fontsize=8)
    axes[0].set_title(f"{len(bits)} {split} images", fontsize=9)
    for axis, chosen, name in ((axes[1], order[:shown], "lowest"), (axes[2], order[-shown:].flip(0), "highest")):
        canvas = grid(images.index_select(0, places[chosen]), levels, columns=4)
        axis.imshow(canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(f"{name}: {', '.join(f'{bits[i]:.2f}' for i in chosen)}", fontsize=7)
    return figure
