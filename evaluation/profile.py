"""What every step of a DDPM costs and how far x̂_0 is from x_0 there, measured on a few images at steps spread over log t."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from lightning.fabric import Fabric
from torch import Tensor

from evaluation.rows import Rows, gather
from lightning_modules import DDPMLightningModule

STEPS = 64  # measured; what lies between is interpolated over ln t


@dataclass(frozen=True, eq=False)
class StepMoments:
    """Moments of KL_t, t = 2..T, over images and noise.

    Attributes:
        means: E[KL_t], (T - 1,), nats.
        root_mean_squares: √E[KL_t²], (T - 1,), nats.
        errors: E‖x_0 - x̂_0(x_t, t)‖²/D, (T - 1,), in [-1, 1] units squared.
        prior: E[KL(q(x_T|x_0) ‖ p(x_T))], nats.
        num_images: images measured on.
        num_steps: steps measured; the others are interpolated.
    """

    means: Tensor
    root_mean_squares: Tensor
    errors: Tensor
    prior: float
    num_images: int
    num_steps: int

    @property
    def calls(self) -> int:
        """Network calls that this took, over all images."""
        return self.num_images * self.num_steps


def measure_steps(model: DDPMLightningModule, rows: Rows, fabric: Fabric, batch_size: int) -> StepMoments:
    """Measures at :data:`STEPS` steps at most: one row for each image, all its steps in it.

    Args:
        model: of T ≥ 2 steps.
        rows: one replicate of each image.
        fabric: where.
        batch_size: network rows at once.
    """
    last = model.num_steps
    spread = torch.logspace(math.log10(2), math.log10(last), STEPS, dtype=torch.float64).round().long()
    steps = spread.clamp(2, last).unique()

    def moments(x: Tensor) -> Tensor:
        x0 = model.to_unit(x)
        columns = [model.process.prior_kl(x0).unsqueeze(1)]
        for part in steps.to(x.device).split(max(1, batch_size // len(x))):
            columns.append(torch.stack(model.step_errors(x0, part.expand(len(x), -1)), 2).flatten(1))
        return torch.cat(columns, 1)

    values, _ = gather(rows, moments, 1 + 2 * len(steps), fabric, max(1, batch_size // len(steps)), lambda _: None)
    values = values[:, 0]
    kls, errors = values[:, 1:].unflatten(1, (-1, 2)).unbind(2)
    every = torch.arange(2, last + 1)
    return StepMoments(
        means=_between(steps, kls.mean(0), every),
        root_mean_squares=_between(steps, kls.square().mean(0).sqrt(), every),
        errors=_between(steps, errors.mean(0), every),
        prior=values[:, 0].mean().item(),
        num_images=len(values),
        num_steps=len(steps),
    )


def _between(steps: Tensor, values: Tensor, every: Tensor) -> Tensor:
    """Interpolates positive values, in ln t and ln value: (S,), (S,), (T - 1,) -> (T - 1,)."""
    log_steps, log_values = steps.double().log(), values.clamp(min=1e-30).log()
    if len(steps) == 1:
        return values.expand(len(every)).clone()
    right = torch.searchsorted(steps, every).clamp(1, len(steps) - 1)
    left = right - 1
    share = (every.double().log() - log_steps[left]) / (log_steps[right] - log_steps[left])
    return torch.exp(log_values[left] + share * (log_values[right] - log_values[left]))
