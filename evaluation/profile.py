"""What every step of a DDPM costs and how far x̂_0 is from x_0 there, measured on a few images at steps spread over log t."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from lightning.fabric import Fabric
from torch import Tensor

from diffusion.control import DENOISERS, Control, level_frequencies
from evaluation.rows import Rows, gather
from lightning_modules import DDPMLightningModule
from losses.elbo import nats_to_bits_per_dim

STEPS = 64  # measured, besides those near t = T; what lies between is interpolated over ln t
FIRST_DRAWS = 8  # of x_1 for each image
LEAST_EFFECTIVE = 0.25  # of the draws must carry a cheap cost's second moment
WORTHWHILE = 0.9  # of the second moment, at most, must be left by the control


@dataclass(frozen=True, eq=False)
class StepMoments:
    """Moments of KL_t, t = 2..T, over images and noise.

    Attributes:
        means: E[KL_t], (T - 1,), nats.
        root_mean_squares: √E[KL_t²], (T - 1,), nats.
        residuals: √E[(KL_t - b_t c_t)²] with the control's factors b_t, (T - 1,), nats.
        control: the control variates, with their factors.
        errors: E‖x_0 - x̂_0(x_t, t)‖²/D, (T - 1,), in [-1, 1] units squared.
        prior: E[KL(q(x_T|x_0) ‖ p(x_T))], nats.
        num_images: images measured on, some of them more than once where there are few.
        num_rows: how often all the steps were measured.
        num_steps: steps measured; the others are interpolated.
    """

    means: Tensor
    root_mean_squares: Tensor
    residuals: Tensor
    control: Control
    errors: Tensor
    prior: float
    num_images: int
    num_rows: int
    num_steps: int

    @property
    def calls(self) -> int:
        """Network calls that this took, over all images."""
        return self.num_rows * (self.num_steps + FIRST_DRAWS)


def rate_and_distortion(moments: StepMoments, num_dims: int, levels: int) -> tuple[Tensor, Tensor]:
    """Returns what x̂_0 at each t = 2..T costs and how far it is off (Ho et al. 2020, figure 5).

    Returns:
        (rate: the prior and the KLs of the steps above t, bits/dim; RMSE of x̂_0(x_t, t), in levels), (T - 1,) each.
    """
    above = moments.means.flip(0).cumsum(0).flip(0) - moments.means + moments.prior
    return nats_to_bits_per_dim(above, num_dims), moments.errors.sqrt() * (levels - 1) / 2


def measured_steps(last: int) -> Tensor:
    """Returns t = 2..T, spread over ln t and, as a model that is not trained yet may be steep there, over ln(T - t): (S,)."""
    spread = torch.logspace(math.log10(2), math.log10(last), STEPS, dtype=torch.float64).round().long()
    before_last = last - 2 ** torch.arange(last.bit_length() - 1)
    return torch.cat([spread, before_last]).clamp(2, last).unique()


def measure_steps(
    model: DDPMLightningModule, rows: Rows, counts: Tensor | None, fabric: Fabric, batch_size: int
) -> StepMoments:
    """Measures at the steps of :func:`measured_steps`, all of them in each row.

    Args:
        model: of T ≥ 2 steps.
        rows: of a few images.
        counts: pixels of each level in each image that is to be evaluated, (N, L); ``None`` for continuous data. How much a
            cheap cost varies is known from them: the few images may lack the one that it is large for.
        fabric: where.
        batch_size: network rows at once.
    """
    last = model.num_steps
    steps = measured_steps(last)
    counts = None if counts is None else counts.to(model.process.betas)
    frequencies = None if counts is None else level_frequencies(counts)
    control = Control(model.process, frequencies, torch.ones(last + 1, DENOISERS))
    found = _measure(model, rows, steps, control, fabric, batch_size)
    kls, errors, cheap = found.steps[..., 0], found.steps[..., 1], found.steps[..., 2:]
    exact = [0.0 if counts is None else control.second_moment(t, counts) for t in steps.tolist()]
    fits = [_factors(kls[:, i], cheap[:, i], exact[i]) for i in range(len(steps))]
    factors, left = (torch.stack(parts) for parts in zip(*fits, strict=True))
    every = torch.arange(2, last + 1)
    every_factor = torch.zeros(last + 1, DENOISERS, dtype=torch.float64)
    every_factor[2:] = torch.stack([_between(steps, factors[:, i], every, logarithms=False) for i in range(DENOISERS)], 1)
    if counts is not None:
        every_factor[1, 1] = _slope(found.first, found.first_cheap, control.first_variance(counts).mean().item())
    return StepMoments(
        means=_between(steps, kls.mean(0), every),
        root_mean_squares=_between(steps, kls.square().mean(0).sqrt(), every),
        residuals=_between(steps, left.sqrt(), every),
        control=Control(model.process, frequencies, every_factor),
        errors=_between(steps, errors.mean(0), every),
        prior=found.prior.mean().item(),
        num_images=len(rows.order),
        num_rows=len(rows),
        num_steps=len(steps),
    )


class _Measured(NamedTuple):
    """What was measured on n rows at S steps, nats but for the errors; c without its factor b."""

    prior: Tensor  # KL(q(x_T|x_0) ‖ p(x_T)): (n,)
    first: Tensor  # -ln p(x_0|x_1): (n, FIRST_DRAWS)
    first_cheap: Tensor  # c_1 of the same x_1: (n, FIRST_DRAWS)
    steps: Tensor  # KL_t, ‖x_0 - x̂_0‖²/D, and c_t of each denoiser: (n, S, 2 + DENOISERS)


def _measure(
    model: DDPMLightningModule, rows: Rows, steps: Tensor, control: Control, fabric: Fabric, batch_size: int
) -> _Measured:
    """Measures at the same steps, (S,), in each row, ``batch_size`` network rows at once."""
    shapes = (), (FIRST_DRAWS,), (FIRST_DRAWS,), (len(steps), 2 + DENOISERS)  # of each field, in one row
    widths = [math.prod(shape) for shape in shapes]

    def in_one(x: Tensor) -> Tensor:
        x0 = model.to_unit(x)
        many = x.repeat_interleave(FIRST_DRAWS, 0)
        first, x_1 = model.first_draws(many, x0.repeat_interleave(FIRST_DRAWS, 0))
        at_steps = []
        for part in steps.to(x.device).split(max(1, batch_size // len(x))):
            draws = model.step_draws(x0, part.expand(len(x), -1))
            cheap = control.costs(draws.x0, draws.x_t, draws.t).view(*draws.kl.shape, -1)
            at_steps.append(torch.cat([draws.kl[..., None], model.squared_errors(draws)[..., None], cheap], 2))
        found = _Measured(model.process.prior_kl(x0), first, control.first_cost(many, x_1), torch.cat(at_steps, 1))
        return torch.cat([values.reshape(len(x), -1) for values in found], 1)

    values, _ = gather(rows, in_one, sum(widths), fabric, max(1, batch_size // len(steps)))
    columns = values.flatten(0, 1).split(widths, 1)
    return _Measured(*(column.reshape(-1, *shape) for column, shape in zip(columns, shapes, strict=True)))


def _factors(kls: Tensor, cheap: Tensor, exact: float) -> tuple[Tensor, Tensor]:
    """Returns the b ≥ 0 that leave least of E[(KL - b · c)²], what drawing t by importance pays for, and what they leave.

    A cheap cost that is carried by a few of the n draws has moments that these draws do not show, and is left out. What they
    lack of the second one's exact E[c²], ``exact``, is added as one more draw, of KL 0: so b² E[c²] is never above E[KL²].

    Args:
        kls: (n,).
        cheap: (n, 2).
        exact: E[c²] of the second.

    Returns:
        (2,), ().
    """
    num, power = len(kls), cheap.square()
    best, least = torch.zeros(DENOISERS, dtype=cheap.dtype), kls.square().mean()
    if not kls.isfinite().all():
        return best, least
    effective = power.sum(0).square() / power.square().sum(0).clamp(min=1e-300)
    usable = effective >= LEAST_EFFECTIVE * num
    unseen = (num * exact - power[:, 1].sum()).clamp(min=0).sqrt()
    kls = torch.cat([kls, kls.new_zeros(1)])
    cheap = torch.cat([cheap, torch.stack([torch.zeros_like(unseen), unseen]).unsqueeze(0)])
    wanted = least * WORTHWHILE
    for chosen in ([0], [1], [0, 1]):
        some = cheap[:, chosen]
        if not (usable[chosen].all() and some.isfinite().all()):
            continue
        solution = torch.linalg.lstsq(some, kls[:, None]).solution[:, 0]
        left = (kls - some @ solution).square().sum() / num
        if solution.isfinite().all() and (solution >= 0).all() and left < wanted:
            best, least = torch.zeros_like(best).index_copy(0, torch.tensor(chosen), solution), left
            wanted = left
    return best, least


def _slope(costs: Tensor, cheap: Tensor, variance: float) -> float:
    """Returns the b ≥ 0 that leaves least variance within an image of costs - b · cheap: (n, draws) each.

    ``variance`` is that of a cheap cost over all draws, mean over images. Where levels stand far apart, draws that these n do
    not hold carry all of it, and by their own variance b could be anything.
    """
    costs, cheap = costs - costs.mean(1, keepdim=True), cheap - cheap.mean(1, keepdim=True)
    freedom = len(cheap) * (cheap.shape[1] - 1)
    slope = (costs * cheap).sum() / max(cheap.square().sum().item(), freedom * variance, 1e-300)
    return float(slope.clamp(min=0)) if slope.isfinite() else 0.0


def _between(steps: Tensor, values: Tensor, every: Tensor, logarithms: bool = True) -> Tensor:
    """Interpolates in ln t, and in ln value unless told otherwise: (S,), (S,), (T - 1,) -> (T - 1,)."""
    if len(steps) == 1:
        return values.expand(len(every)).clone()
    place, heights = steps.double().log(), values.clamp(min=1e-30).log() if logarithms else values
    right = torch.searchsorted(steps, every).clamp(1, len(steps) - 1)
    left = right - 1
    share = (every.double().log() - place[left]) / (place[right] - place[left])
    heights = heights[left] + share * (heights[right] - heights[left])
    return heights.exp() if logarithms else heights
