r"""p(x | z) for pixels: distributions over ``levels`` integers, and a Gaussian density for continuous data.

A pixel takes the levels 0..L-1, placed at 2k/(L-1) - 1 in [-1, 1], so neighbours are 2/(L-1) apart. A discretised density gives

.. math::  P(k) = F(x_k + 1/(L-1)) - F(x_k - 1/(L-1)), \qquad F\text{ taken as 0 below level 0 and 1 above level L-1},

so that Σ_k P(k) = 1 exactly (Salimans et al. 2017, eq. 2; Ho et al. 2020, eq. 13). Parameters come as one tensor (B, P·C, H, W)
with P = ``params_per_channel``, parameter-major: ``params.unflatten(1, (P, C))`` separates them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.checks import is_whole
from losses.elementary import log1mexp, log_normal_cdf
from losses.gaussian import HALF_LOG_2PI, DiagGaussian, full_precision, sum_except_batch


def to_unit(x: Tensor, levels: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    """Maps levels to [-1, 1]: k -> 2k/(levels-1) - 1, integers as numbers of ``dtype`` (floating input keeps its own)."""
    half = (levels - 1) / 2  # exact in floating point, so that level 0 is exactly -1 and L-1 exactly 1
    return (x - half if x.is_floating_point() else x.to(dtype).sub_(half)).div_(half)


def from_unit(x: Tensor, levels: int = 256) -> Tensor:
    """Inverse of :func:`to_unit`: clamps to [-1, 1] and rounds to the nearest level, uint8."""
    return ((full_precision(x).clamp(-1, 1) + 1) * ((levels - 1) / 2)).round().to(torch.uint8)


class Likelihood(Protocol):
    """A distribution over images, given a network's output.

    Attributes:
        levels: number of values a pixel can take, or ``None`` for a density over the reals.
        params_per_channel: P, how many numbers of the network's output describe one pixel of one channel.
    """

    levels: int | None
    params_per_channel: int

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """Returns ln P(x) in nats per image: params (B, P·C, H, W), x (B, C, H, W), uint8 where there are levels -> (B,)."""

    def mean(self, params: Tensor) -> Tensor:
        """Returns the mean of each pixel, where there are levels the one nearest to it as uint8: (B, C, H, W)."""

    def sample(self, params: Tensor) -> Tensor:
        """Draws an image: (B, C, H, W), uint8 where there are levels."""


def check_levels(levels: int | None) -> None:
    """Refuses numbers of levels that a uint8 pixel cannot take.

    Raises:
        ValueError: if ``levels`` is not an integer in 2..256.
    """
    if levels is None:
        raise ValueError("this likelihood is for levels, and the data is continuous: choose model/likelihood=gaussian")
    if not is_whole(levels, 2) or levels > 256:
        raise ValueError(f"levels must be an integer from 2 to 256, got {levels!r}")


def _split(params: Tensor, num: int) -> Tensor:
    """Separates the parameters of a pixel, in float32 or better: (B, P·C, H, W) -> (B, P, C, H, W)."""
    if params.shape[1] % num:
        raise ValueError(f"the network gives {params.shape[1]} channels, not a multiple of params_per_channel={num}")
    return full_precision(params).unflatten(1, (num, -1))


def _draw_one(logits: Tensor) -> Tensor:
    """Draws k of each pixel with P(k) = softmax(logits)_k by the Gumbel-max trick: (B, K, C, H, W) -> int64 (B, C, H, W)."""
    return (logits - torch.empty_like(logits).exponential_().log()).argmax(1)


def _check(params: Tensor, x: Tensor, num: int) -> None:
    """Refuses parameters of other pixels, which would broadcast to a finite and wrong figure."""
    if params.ndim < 2 or x.ndim < 2 or params.shape != (x.shape[0], num * x.shape[1], *x.shape[2:]):
        raise ValueError(
            f"parameters of shape {tuple(params.shape)} do not belong to images of shape {tuple(x.shape)}: for each channel "
            f"there must be {num}"
        )


@dataclass(frozen=True)
class Bernoulli:
    """Two levels, one logit a pixel: P(x = 1) = sigmoid(logit).

    Raises:
        ValueError: if ``levels`` is not 2, since a Bernoulli "likelihood" of grey values normalises to nothing.
    """

    levels: int = 2
    params_per_channel: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.levels != 2:
            raise ValueError(
                f"likelihood=bernoulli is for 2 levels, but the data has {self.levels}: choose another likelihood, "
                "or binarise the data (data/binarization=static or dynamic, where the data set has it)"
            )

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """Returns ln P(x), nats: (B, C, H, W), (B, C, H, W) -> (B,)."""
        _check(params, x, 1)
        logits = full_precision(params)
        return sum_except_batch(F.logsigmoid(logits * to_unit(x, 2).to(logits.dtype)))  # 1 - sigmoid(l) = sigmoid(-l)

    def mean(self, params: Tensor) -> Tensor:
        """Returns 1 where P(x = 1) > 1/2: uint8 (B, C, H, W)."""
        return (params > 0).to(torch.uint8)

    def sample(self, params: Tensor) -> Tensor:
        """Draws a binary image: uint8 (B, C, H, W)."""
        return torch.bernoulli(full_precision(params).sigmoid()).to(torch.uint8)


@dataclass(frozen=True)
class Categorical:
    """Any number of levels, a logit for each: P(k) = softmax(logits)_k. Zero logits score exactly log2(levels) bits."""

    levels: int = 256
    params_per_channel: int = field(init=False)

    def __post_init__(self) -> None:
        check_levels(self.levels)
        object.__setattr__(self, "params_per_channel", self.levels)

    def logits(self, params: Tensor) -> Tensor:
        """Returns one logit for each level: (B, L·C, H, W) -> (B, L, C, H, W)."""
        return _split(params, self.levels)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """Returns ln P(x), nats: (B, L·C, H, W), (B, C, H, W) -> (B,)."""
        _check(params, x, self.levels)
        return -sum_except_batch(F.cross_entropy(self.logits(params), x.long(), reduction="none"))

    def mean(self, params: Tensor) -> Tensor:
        """Returns the level nearest to Σ_k P(k) k: uint8 (B, C, H, W)."""
        level = torch.arange(self.levels, device=params.device, dtype=full_precision(params).dtype)
        return self.expectation(params, level).round().to(torch.uint8)

    def expectation(self, params: Tensor, values: Tensor) -> Tensor:
        """Returns Σ_k P(k) values_k of each pixel: (B, L·C, H, W) or (B, L, C, H, W), (L,) -> (B, C, H, W)."""
        logits = params if params.ndim == 5 else self.logits(params)
        # no matrix product: mixed precision would round the probabilities and the values to eight bits
        return (logits.softmax(1) * values.view(-1, 1, 1, 1)).sum(1)

    def sample(self, params: Tensor) -> Tensor:
        """Draws a level for each pixel: uint8 (B, C, H, W)."""
        return _draw_one(self.logits(params)).to(torch.uint8)


@dataclass(frozen=True)
class _Discretized:
    """A location-scale density integrated over the bin of each level; params are (mean, ln scale), both in [-1, 1] units.

    A scale has a floor, far below a bin: ln P would not be a number under it.
    """

    levels: int = 256
    params_per_channel: ClassVar[int] = 2
    tail: ClassVar[int]  # ln F(-z) falls like -z^tail

    def __post_init__(self) -> None:
        check_levels(self.levels)

    def _floored(self, log_scale: Tensor) -> Tensor:
        """Ln scale, from where a mean some million away still has a finite ln P: -28 for a Gaussian in float32."""
        return log_scale.clamp(min=math.log(1e7) - math.log(torch.finfo(log_scale.dtype).max) / self.tail)

    def _log_mass(self, lower: Tensor, upper: Tensor, log_width: Tensor) -> Tensor:
        """ln(F(upper) - F(lower)) for standardised edges e^log_width apart, which their difference holds rounded only."""
        raise NotImplementedError

    def _log_cdf(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def _noise(self, like: Tensor) -> Tensor:
        raise NotImplementedError

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """Returns ln P(x), nats: (B, 2·C, H, W), (B, C, H, W) -> (B,)."""
        _check(params, x, 2)
        mean, log_scale = _split(params, 2).unbind(1)
        return sum_except_batch(self.log_mass(mean, log_scale, x))

    def log_mass(self, mean: Tensor, log_scale: Tensor, x: Tensor) -> Tensor:
        """Returns ln P(x) of each pixel, nats: tensors that broadcast together, x of integers -> their shape."""
        log_scale = self._floored(log_scale)
        inverse_scale = torch.exp(-log_scale)
        # Both edges of a bin come from integers, so a level's upper edge and the next one's lower edge are the same
        # float and the probabilities telescope to one.
        centre = 2 * x.to(mean.dtype) - (self.levels - 1)
        lower = ((centre - 1) / (self.levels - 1) - mean) * inverse_scale
        upper = ((centre + 1) / (self.levels - 1) - mean) * inverse_scale
        lowest, highest = x == 0, x == self.levels - 1
        open_ended = self._log_cdf(torch.where(lowest, upper, -lower))  # F(-z) = 1 - F(z): both are symmetric
        log_width = math.log(2 / (self.levels - 1)) - log_scale
        return torch.where(lowest | highest, open_ended, self._log_mass(lower, upper, log_width))

    def mean(self, params: Tensor) -> Tensor:
        """Returns the level nearest to the mean parameter: uint8 (B, C, H, W)."""
        return from_unit(_split(params, 2)[:, 0], self.levels)

    def sample(self, params: Tensor) -> Tensor:
        """Draws from the density and rounds to the nearest level, which is a draw from P: uint8 (B, C, H, W)."""
        return self.draw(*_split(params, 2).unbind(1))

    def draw(self, mean: Tensor, log_scale: Tensor) -> Tensor:
        """Draws each pixel from its mean and scale, of one shape: uint8 of that shape."""
        return from_unit(mean + self._floored(log_scale).exp() * self._noise(mean), self.levels)


class DiscretizedGaussian(_Discretized):
    """N(mean, scale²) integrated over each level's bin (Ho et al. 2020, eq. 13). Params: mean, ln scale."""

    tail: ClassVar[int] = 2

    def _log_cdf(self, z: Tensor) -> Tensor:
        return log_normal_cdf(z)

    def _log_mass(self, lower: Tensor, upper: Tensor, log_width: Tensor) -> Tensor:
        middle, width = 0.5 * (lower + upper), log_width.exp()
        flat = (1 + middle.abs()) * width < (1920 * torch.finfo(width.dtype).eps) ** 0.25
        flip = middle > 0  # in the upper tail both cdfs round to 1: mirror the bin into the lower tail
        log_upper = self._log_cdf(torch.where(flip, -lower, upper))
        # not where the density is flat: there the cdfs round to one number, which has no gradient
        log_lower = torch.where(flat, log_upper - 1, self._log_cdf(torch.where(flip, -upper, lower)))
        # F(m + w/2) - F(m - w/2) = w φ(m) (1 + (m² - 1) w²/24 + (m⁴ - 6 m² + 3) w⁴/1920 + ...)
        square, width = torch.where(flat, middle, 0.0).square(), torch.where(flat, width, 1.0)
        narrow = log_width - 0.5 * square - HALF_LOG_2PI + (square - 1) * width.square() / 24
        return torch.where(flat, narrow, log_upper + log1mexp(log_lower - log_upper))

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn_like(like)


class DiscretizedLogistic(_Discretized):
    """Logistic(mean, scale) integrated over each level's bin (Salimans et al. 2017). Params: mean, ln scale."""

    tail: ClassVar[int] = 1

    def _log_cdf(self, z: Tensor) -> Tensor:
        return F.logsigmoid(z)

    def _log_mass(self, lower: Tensor, upper: Tensor, log_width: Tensor) -> Tensor:
        # F(b) - F(a) = F(b) F(-a) (1 - e^-w) for the logistic function: no cancellation anywhere; where w itself is not to be
        # had, ln(1 - e^-w) = ln w - w/2 + w²/24 - w⁴/2880 ...
        width = log_width.exp()
        narrow = width < (2880 * torch.finfo(width.dtype).eps) ** 0.25
        small, large = torch.where(narrow, width, 0.0), torch.where(narrow, 1.0, width)
        log_part = torch.where(narrow, log_width - 0.5 * small + small.square() / 24, log1mexp(-large))
        return F.logsigmoid(upper) + F.logsigmoid(-lower) + log_part

    def _noise(self, like: Tensor) -> Tensor:
        return torch.logit(torch.rand_like(like).clamp(torch.finfo(like.dtype).tiny, 1 - torch.finfo(like.dtype).eps))


@dataclass(frozen=True)
class DiscretizedLogisticMixture:
    """Σ_k π_k DiscretizedLogistic(mean_k, scale_k) for each pixel of each channel.

    As in Salimans et al. (2017), eq. 2, without their coupling of channels. Params, each ``components`` = K times: logits of π,
    means, ln scales. The means are relative to places spread over [-1, 1]: mean_k is the parameter + linspace(-1, 1, K + 2)[k],
    k = 1..K.

    Raises:
        ValueError: if ``levels`` or ``components`` is out of range.
    """

    levels: int = 256
    components: int = 2
    params_per_channel: int = field(init=False)
    component: DiscretizedLogistic = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not is_whole(self.components, 1):
            raise ValueError(f"likelihood.components={self.components!r} must be an integer of at least 1")
        object.__setattr__(self, "params_per_channel", 3 * self.components)
        object.__setattr__(self, "component", DiscretizedLogistic(self.levels))

    def _parts(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (ln π, means, ln scales): (B, 3K·C, H, W) -> (B, K, C, H, W) each.

        Places of their own, as from equal means no component would ever learn to differ.
        """
        logits, mean, log_scale = _split(params, self.params_per_channel).chunk(3, 1)
        places = torch.linspace(-1, 1, self.components + 2, dtype=mean.dtype, device=mean.device)[1:-1]
        return logits.log_softmax(1), mean + places.view(-1, 1, 1, 1), log_scale

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """Returns ln P(x), nats: (B, 3K·C, H, W), (B, C, H, W) -> (B,)."""
        _check(params, x, self.params_per_channel)
        log_share, mean, log_scale = self._parts(params)
        return sum_except_batch(torch.logsumexp(log_share + self.component.log_mass(mean, log_scale, x.unsqueeze(1)), 1))

    def mean(self, params: Tensor) -> Tensor:
        """Returns the level nearest to Σ_k π_k mean_k, each mean inside [-1, 1]: uint8 (B, C, H, W)."""
        log_share, mean, _ = self._parts(params)
        return from_unit((log_share.exp() * mean.clamp(-1, 1)).sum(1), self.levels)

    def sample(self, params: Tensor) -> Tensor:
        """Draws a component, then a level, for each pixel: uint8 (B, C, H, W)."""
        log_share, mean, log_scale = self._parts(params)
        chosen = _draw_one(log_share).unsqueeze(1)
        return self.component.draw(mean, log_scale).gather(1, chosen).squeeze(1)


@dataclass(frozen=True)
class Gaussian:
    """A density over the reals, for continuous data only; its figure is nats, not bits/dim of levels. Params: mean, ln std.

    Raises:
        ValueError: if ``levels`` is given: a density on integers compares with nothing.
    """

    levels: None = None
    params_per_channel: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.levels is not None:
            raise ValueError(
                f"model/likelihood=gaussian is a density, but the data has {self.levels} levels, where densities mean nothing: "
                "choose model/likelihood=discretized_gaussian"
            )

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """Returns the log-density ln p(x), nats: (B, 2·C, H, W), (B, C, H, W) -> (B,)."""
        _check(params, x, 2)
        return DiagGaussian(*_split(params, 2).unbind(1)).log_prob(x)

    def mean(self, params: Tensor) -> Tensor:
        """Returns the mean, in data units: (B, C, H, W)."""
        return _split(params, 2)[:, 0]

    def sample(self, params: Tensor) -> Tensor:
        """Draws x, in data units: (B, C, H, W)."""
        return DiagGaussian(*_split(params, 2).unbind(1)).sample()
