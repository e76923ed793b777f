"""Small models for measurements: a linear-Gaussian chain whose every answer is known, and digits after a short training."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from datamodules import DigitsDataModule
from diffusion import X0, Lattice, Parameterization, cosine
from lightning_modules import DDPMLightningModule
from networks import MLPDenoiser


def digits() -> dict[str, Tensor]:
    """Returns the splits of scikit-learn's digits: uint8 (n, 1, 8, 8) each."""
    data = DigitsDataModule(image_shape=[1, 8, 8], levels=17, batch_size=128, seed=0)
    data.setup()
    return data.splits


class LinearPredictor(nn.Module):
    """x̂_0(x, t) = (√ᾱ_t - √(1 - ᾱ_t) · scale · k_t) x in one dimension: v̂ = scale · k_t · x, optimal at scale 1.

    An imperfection in v costs a bounded KL at every t; in ε it would be dominated by t = T, in x_0 by t = 1.
    """

    def __init__(self, bar: Tensor, s2: float, scale: float) -> None:
        super().__init__()
        self.register_buffer("bar", bar)
        self.register_buffer("gain", (bar * (1 - bar)).sqrt() * (1 - s2) / (bar * s2 + 1 - bar))
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns x̂_0: x (B, 1, 1, 1), t (B,)."""
        bar, gain = self.bar[t - 1], self.gain[t - 1]
        return (bar.sqrt() - (1 - bar).sqrt() * self.scale * gain).view(-1, 1, 1, 1) * x


def linear_gaussian(num_steps: int, s2: float, scale: float, schedule: Callable[[int], Tensor] = cosine) -> DDPMLightningModule:
    """Returns a chain over x_0 ~ N(0, s2) whose v̂ is the optimal one, E[v|x_t], times ``scale``, in float64."""
    network = LinearPredictor(torch.cumprod(1 - schedule(num_steps), 0), s2, scale)
    return DDPMLightningModule(network, schedule, num_steps, X0(), image_shape=(1, 1, 1), levels=None).double()


def linear_gaussian_elbo(betas: list[float], s2: float, scale: float) -> float:
    """Returns the exact ELBO of :func:`linear_gaussian` in nats, from the two-variable form's closed terms (``small`` σ²)."""
    bars = [1.0]
    for beta in betas:
        bars.append(bars[-1] * (1 - beta))
    value = -0.5 * (bars[-1] * s2 - bars[-1] - math.log(1 - bars[-1]))
    for t, beta in enumerate(betas, start=1):
        noise = 1 - bars[t]
        velocity = scale * math.sqrt(bars[t] * noise) * (1 - s2) / (bars[t] * s2 + noise)
        gain = math.sqrt(bars[t]) - math.sqrt(noise) * velocity
        error = (1 - gain * math.sqrt(bars[t])) ** 2 * s2 + gain**2 * noise  # E(x_0 - x̂_0)²
        if t > 1:
            value -= 0.5 * (bars[t - 1] / (1 - bars[t - 1]) - bars[t] / noise) * error
        else:  # p(x_0|x_1) = N(x̂_0, β̃_2)
            second = betas[1] * (1 - bars[1]) / (1 - bars[2]) if len(betas) > 1 else beta
            value += -0.5 * math.log(2 * math.pi * second) - error / (2 * second)
    return value


def trained_digits(
    num_steps: int,
    images: Tensor,
    schedule: Callable[[int], Tensor],
    parameterization: Parameterization | None = None,
    steps: int = 300,
) -> DDPMLightningModule:
    """Returns a small denoiser of digits after ``steps`` optimiser steps of 128 images."""
    parameterization = parameterization or Lattice(17)
    torch.manual_seed(0)
    network = partial(MLPDenoiser, hidden_dim=128, num_blocks=2)
    model = DDPMLightningModule(network, schedule, num_steps, parameterization, image_shape=(1, 8, 8), levels=17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    for _ in range(steps):
        loss, _ = model.objective(images[torch.randint(len(images), (128,))])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()
