r"""What the network predicts, and how x̂_0, ε̂ and the likelihood p_θ(x_0 | x_1) follow from it.

All are models of one chain: p_θ(x_{t-1}|x_t) = q(x_{t-1} | x_t, x_0 = x̂_0). They differ in what the network finds easy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from losses import Categorical, DiscretizedGaussian, Gaussian, Likelihood, to_unit
from losses.gaussian import full_precision

if TYPE_CHECKING:
    from diffusion.process import GaussianDiffusion


class Parameterization(ABC):
    """Turns the network's output at (x_t, t) into x̂_0."""

    outputs_per_channel: int = 1
    bounded: bool = False  # whether x̂_0 lies in [-1, 1] without being clamped
    least_signal: float = 0.0  # of √ᾱ_T, whose inverse, squared in the KL, float32 must hold

    def check(self, process: GaussianDiffusion) -> None:
        """Refuses a chain on which x̂_0 cannot be worked out.

        Raises:
            ValueError: if √ᾱ_T is below ``least_signal``.
        """
        signal = process.sqrt_alpha_bar[-1].item()
        if signal < self.least_signal:
            raise ValueError(
                f"model/parameterization={type(self).__name__.lower()} divides by sqrt(alpha_bar_T), which this schedule lets "
                f"fall to {signal:.1e} in num_steps={process.num_steps}: choose model/parameterization=x0, or a schedule or "
                f"number of steps that ends above {self.least_signal:.0e}"
            )

    def _check_output(self, output: Tensor, x_t: Tensor) -> None:
        """Refuses a network that gives other numbers than P for each pixel, as they would broadcast."""
        due = (x_t.shape[0], self.outputs_per_channel * x_t.shape[1], *x_t.shape[2:]) if x_t.ndim > 1 else x_t.shape
        if output.shape != due:
            raise ValueError(
                f"the network gives {tuple(output.shape)} for x_t of {tuple(x_t.shape)}, but "
                f"parameterization={type(self).__name__.lower()} takes {tuple(due)}"
            )

    @abstractmethod
    def x0(self, output: Tensor, x_t: Tensor, t: Tensor | int, process: GaussianDiffusion) -> Tensor:
        """Returns x̂_0(x_t, t) in [-1, 1] units: output (B, P·C, H, W), x_t (B, C, H, W) -> (B, C, H, W).

        t is (B,), or one integer for all: a sampler's steps, where a coefficient for each image would only cost time.
        """

    def epsilon(self, output: Tensor, x_t: Tensor, t: Tensor | int, process: GaussianDiffusion) -> Tensor:
        """Returns ε̂ = (x_t - √ᾱ_t x̂_0)/√(1 - ᾱ_t): (B, C, H, W)."""
        x0_hat = self.x0(output, x_t, t, process)
        return (x_t - process.at(process.sqrt_alpha_bar, t, x_t) * x0_hat) / process.at(process.noise_std, t, x_t)

    def likelihood(self, levels: int | None) -> Likelihood:
        """Returns the family of p_θ(x_0 | x_1): N(μ_θ, σ_1²), integrated over each level's bin where there are levels."""
        return Gaussian() if levels is None else DiscretizedGaussian(levels)

    def likelihood_params(self, output: Tensor, x_1: Tensor, process: GaussianDiffusion, clip: bool) -> Tensor:
        """Returns the parameters of :meth:`likelihood`, from the network's output at t = 1: (B, P·C, H, W)."""
        reverse = process.reverse(output, x_1, 1, self, clip)
        return torch.cat([reverse.mean, reverse.log_std.expand_as(reverse.mean)], 1)


class Epsilon(Parameterization):
    """The network predicts the noise: x̂_0 = (x_t - √(1 - ᾱ_t) ε_θ)/√ᾱ_t (Ho et al. 2020)."""

    least_signal = 1e-16

    def x0(self, output: Tensor, x_t: Tensor, t: Tensor | int, process: GaussianDiffusion) -> Tensor:
        """See :meth:`Parameterization.x0`."""
        noise = self.epsilon(output, x_t, t, process)
        if isinstance(t, int):  # plain numbers: to gather and cast two coefficients takes longer than the rest
            scale, std = process.scales(t)
            return torch.sub(x_t, noise, alpha=std).div_(scale)
        signal = torch.addcmul(x_t, process.at(process.noise_std, t, x_t), noise, value=-1)
        return signal.div_(process.at(process.sqrt_alpha_bar, t, x_t))

    def epsilon(self, output: Tensor, x_t: Tensor, t: Tensor | int, process: GaussianDiffusion) -> Tensor:
        """Returns the output itself, in float32 or better: (B, C, H, W)."""
        self._check_output(output, x_t)
        return full_precision(output)


class X0(Parameterization):
    """The network predicts the clean image itself."""

    def x0(self, output: Tensor, x_t: Tensor, t: Tensor | int, process: GaussianDiffusion) -> Tensor:
        """See :meth:`Parameterization.x0`."""
        self._check_output(output, x_t)
        return full_precision(output)


class Lattice(Parameterization):
    r"""The network gives logits f_θ(x_t, t) for each pixel and level; the exact ln q(x_t | level) is added to them.

    .. math::
        P(ℓ | x_t) ∝ \exp(f_θ(x_t, t)_ℓ - (x_t - \sqrt{ᾱ_t} ℓ)^2 / (2 (1 - ᾱ_t))), \qquad \hat x_0 = Σ_ℓ P(ℓ | x_t) ℓ

    so the network supplies the prior of a level given the rest of the image and need not learn to round. At t = 1, P *is*
    the likelihood (as the decoder of Kingma et al. 2021, section 3.3, and with a learned term).

    Args:
        levels: L, the number of levels of a pixel.

    Raises:
        ValueError: if the data is continuous (``levels`` is ``None``).
    """

    bounded = True

    def __init__(self, levels: int | None) -> None:
        if levels is None:
            raise ValueError(
                "parameterization=lattice needs levels, but this data is continuous: choose model/parameterization=epsilon"
            )
        self.levels = self.outputs_per_channel = levels
        self.categorical = Categorical(levels)

    def likelihood(self, levels: int | None) -> Categorical:
        """Returns a Categorical over the levels."""
        if levels != self.levels:
            raise ValueError(f"parameterization=lattice was built for {self.levels} levels, but the data has {levels}")
        return self.categorical

    def x0(self, output: Tensor, x_t: Tensor, t: Tensor | int, process: GaussianDiffusion) -> Tensor:
        """See :meth:`Parameterization.x0`; always inside [-1, 1]."""
        logits = self._logits(output, x_t, t, process)
        return self.categorical.expectation(logits, self._positions(logits))

    def likelihood_params(self, output: Tensor, x_1: Tensor, process: GaussianDiffusion, clip: bool) -> Tensor:
        """Returns the logits of P at t = 1: (B, L·C, H, W)."""
        return self._logits(output, x_1, 1, process).flatten(1, 2)

    def _positions(self, like: Tensor) -> Tensor:
        return to_unit(torch.arange(self.levels, device=like.device), self.levels, like.dtype)

    def _logits(self, output: Tensor, x_t: Tensor, t: Tensor | int, process: GaussianDiffusion) -> Tensor:
        """f_θ + ln q(x_t | level) up to a constant: (B, L, C, H, W)."""
        self._check_output(output, x_t)
        logits = self.categorical.logits(output)
        means = process.at(process.sqrt_alpha_bar, t, logits) * self._positions(logits).view(1, -1, 1, 1, 1)
        precision = torch.exp(-2 * process.at(process.log_noise_std, t, logits))
        # squared, not multiplied out: at SNR 1e4 the products would cancel four digits in float32
        return logits - 0.5 * precision * (x_t.unsqueeze(1) - means).square()
