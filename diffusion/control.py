r"""Control variates for a step's KL: the same step of two denoisers that cost no network call.

Much of a step's noise needs no network to see. The first denoiser takes x_t at its word, \hat x = x_t/√ᾱ_t, so its error is
the noise itself. The second, for pixels, knows how often each of the L levels occurs, π_ℓ, and takes every pixel alone:
P_π(ℓ|x_t) ∝ π_ℓ \exp(-(x_t - √ᾱ_t ℓ)²/(2(1 - ᾱ_t))), whose error has the noise of pixels that lie between two levels.

.. math::
    c_t = ½ (a_t/σ_t)^2 ‖x_0 - \hat x(x_t)‖^2 \quad (t ≥ 2), \qquad c_1 = -\ln P_π(x_0 | x_1)

with a_t the weight of x_0 in q's posterior mean, rises and falls with KL_t at the same x_t. Its mean over the noise is known:
½ (a_t/σ_t)² D (1 - ᾱ_t)/ᾱ_t for the first; for the second a sum over pixels of a function of their level, by quadrature. So
KL_t - b_t c_t + b_t E[c_t] has the mean of KL_t whatever b_t and π are, and often far less noise.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.parameterizations import Lattice
from diffusion.process import GaussianDiffusion
from losses import sum_except_batch

DENOISERS = 2
REACH = 8.5  # standard deviations that the quadrature covers: what lies outside weighs 1e-17
LEAST = 40.0  # e^-40 is left out of a sum of probabilities
STEP, LEAST_STEP = 0.15, 0.015  # of the trapezium rule, as long as the second denoiser bends no faster than the noise


def level_counts(images: Tensor, levels: int) -> Tensor:
    """Returns how many pixels of each image have each level: (N, C, H, W) -> (N, L) float64."""
    places = images.cpu().long().flatten(1) + levels * torch.arange(len(images)).unsqueeze(1)
    return torch.bincount(places.flatten(), minlength=len(images) * levels).view(len(images), levels).double()


def level_frequencies(counts: Tensor) -> Tensor:
    """Returns how often each level occurs, (N, L) -> (L,), with half a pixel more of each so that none is impossible."""
    total = counts.sum(0) + 0.5
    return total / total.sum()


class Control:
    """b_t c_t and its mean.

    Args:
        process: the chain.
        frequencies: π, (L,), positive; ``None`` for continuous data, which has the first denoiser alone.
        factors: b_t of each denoiser for t = 0..T, (T + 1, 2); t = 1 has the second alone, and row 0 is not used.
    """

    def __init__(self, process: GaussianDiffusion, frequencies: Tensor | None, factors: Tensor) -> None:
        self.process = process
        self.lattice = None if frequencies is None else Lattice(len(frequencies))
        self.log_frequencies = None if frequencies is None else frequencies.log().to(process.betas)
        self.factors = factors.to(process.betas)
        self.weights = 0.5 * torch.exp(2 * (process.posterior_x0.log() - process.log_reverse_std))
        # of ‖√ᾱ_t x_0 - x_t‖², from a_t/√ᾱ_t = β_t/(√α_t (1 - ᾱ_t)): √ᾱ_t itself may be 0
        log_word = process.betas.log() - process.sqrt_alpha.log() - 2 * process.log_noise_std
        self.word_weights = 0.5 * torch.exp(2 * (log_word - process.log_reverse_std))
        self._totals: tuple[Tensor, Tensor] | None = None

    def _output(self, like: Tensor) -> Tensor:
        """Returns ln π as a network's output for ``like`` (B, C, H, W): (B, L·C, H, W)."""
        output = self.log_frequencies.to(like.dtype).repeat_interleave(like.shape[1]).view(1, -1, 1, 1)
        return output.expand(len(like), -1, *like.shape[2:])

    def costs(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns c_t of both denoisers, zero for one that is missing: x0, x_t (B, C, H, W), t (B,) in 2..T -> (B, 2), nats."""
        word = sum_except_batch((self.process.at(self.process.sqrt_alpha_bar, t, x_t) * x0 - x_t).square())
        alone = torch.zeros_like(word)
        if self.lattice is not None:
            alone = sum_except_batch((x0 - self.lattice.x0(self._output(x_t), x_t, t, self.process)).square())
        weights = torch.stack([self.word_weights[t], self.weights[t]], 1)
        return weights.to(word.dtype) * torch.stack([word, alone], 1)

    def first_cost(self, x: Tensor, x_1: Tensor) -> Tensor:
        """Returns c_1: x uint8, x_1 (B, C, H, W) -> (B,), nats; zero for continuous data."""
        if self.lattice is None:
            return x_1.new_zeros(len(x_1))
        params = self.lattice.likelihood_params(self._output(x_1), x_1, self.process, clip=False)
        return -self.lattice.categorical.log_prob(params, x)

    def first_variance(self, counts: Tensor) -> Tensor:
        """Returns the variance of c_1 over x_1, of images with these pixels of each level: (N, L) -> (N,), nats squared."""
        surprise, square, _, _ = self._pixel(1)
        return counts @ (square - surprise.square()).clamp(min=0)

    def second_moment(self, t: int, counts: Tensor) -> float:
        """Returns E[c_t²] of the second denoiser, b_t left out, over x_t and images with these pixels of each level: (N, L)."""
        _, _, error, square = self._pixel(t)
        variances = counts @ (square - error.square()).clamp(min=0)
        return float(self.weights[t].square() * ((counts @ error).square() + variances).mean())

    def step(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns b_t c_t, summed over the denoisers: (B,), nats."""
        costs = self.costs(x0, x_t, t)
        return (self.factors[t].to(costs.dtype) * costs).sum(1)

    def first(self, x: Tensor, x_1: Tensor) -> Tensor:
        """Returns b_1 c_1: (B,), nats."""
        return self.factors[1, 1].to(x_1.dtype) * self.first_cost(x, x_1)

    def totals(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (b_1 E[c_1], Σ_{t≥2} b_t E[c_t]) of images x (B, C, H, W): (B,) float64 each, nats."""
        if self._totals is None:
            self._totals = self._expectations()
        first, steps = self._totals
        index = torch.zeros_like(x, dtype=torch.int64) if self.lattice is None else x.long()
        return sum_except_batch(first[index]), sum_except_batch(steps[index])

    def _expectations(self) -> tuple[Tensor, Tensor]:
        """Means of b_1 c_1 and Σ b_t c_t of one pixel, by its level: (L,) float64 each."""
        process = self.process
        word = self.factors[2:, 0] * self.word_weights[2:] * process.noise_std[2:].square()
        levels = 1 if self.lattice is None else self.lattice.levels
        first = process.betas.new_zeros(levels)
        steps = word.sum().expand(levels).clone()
        if self.lattice is None:
            return first, steps
        for t in (self.factors[1:, 1].nonzero().flatten() + 1).tolist():
            surprise, _, error, _ = self._pixel(t)
            if t == 1:
                first = self.factors[1, 1] * surprise
            else:
                steps += self.factors[t, 1] * self.weights[t] * error
        return first, steps

    def _pixel(self, t: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns first and second moments of -ln P_π(ℓ | x_t), then of (ℓ - x̂)², over x_t from each level ℓ: (L,) float64.

        Either all levels share the nodes x_t, or each has its own, where only the levels near it can be meant: the first takes
        many nodes where the noise is small, the second many levels where it is large.
        """
        intervals = len(self.log_frequencies) - 1
        unit = 2 / intervals  # from level to level, and in standard deviations of x_t:
        gap = unit * float(self.process.sqrt_alpha_bar[t] / self.process.noise_std[t])
        step = max(LEAST_STEP, STEP / max(gap, 1))  # x̂ bends over 1/gap standard deviations where the levels stand apart
        likely = float(self.log_frequencies.max() - self.log_frequencies.min())
        near = REACH + math.sqrt(REACH**2 + 2 * (LEAST + likely))  # how far a level may be that can be meant
        reach = intervals if near >= gap * intervals else math.ceil(near / gap)
        own, shared = self._nodes(REACH, step), self._nodes(0.5 * gap * intervals + REACH, step)
        if len(shared) <= len(own) * (2 * reach + 1):
            return self._by_shared_nodes(shared, gap, unit)
        return self._by_own_nodes(own, gap, unit, reach)

    def _by_shared_nodes(self, nodes: Tensor, gap: float, unit: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns what :meth:`_pixel` does, from x_t at ``nodes`` around the middle level, for all levels at once."""
        levels = len(self.log_frequencies)
        place = torch.arange(levels).to(nodes) - 0.5 * (levels - 1)
        exponent = -0.5 * (nodes[:, None] - gap * place).square()  # (nodes, L)
        density = exponent.softmax(0)
        log_p = (self.log_frequencies + exponent).log_softmax(1)
        error = (unit * (place - (log_p.exp() @ place)[:, None])).square()
        return tuple((density * cost).sum(0) for cost in (-log_p, log_p.square(), error, error.square()))

    def _by_own_nodes(self, nodes: Tensor, gap: float, unit: float, reach: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns what :meth:`_pixel` does, from x_t at ``nodes`` around each level, with ``reach`` levels on either side."""
        density = (-0.5 * nodes.square()).softmax(0)
        offset = torch.arange(-reach, reach + 1).to(nodes)
        around = F.pad(self.log_frequencies, (reach, reach), value=-math.inf).unfold(0, len(offset), 1)  # (L, 2 reach + 1)
        log_p = (around[:, None] - 0.5 * (nodes[:, None] - gap * offset).square()).log_softmax(2)  # (L, nodes, 2 reach + 1)
        own_log_p, error = log_p[..., reach], (unit * (log_p.exp() @ offset)).square()
        return tuple(cost @ density for cost in (-own_log_p, own_log_p.square(), error, error.square()))

    def _nodes(self, half: float, step: float) -> Tensor:
        """Returns places from -half to half, in standard deviations, no further than ``step`` apart: float64."""
        return torch.linspace(-half, half, 1 + 2 * math.ceil(half / step), dtype=torch.float64).to(self.process.betas)
