r"""The chain: q(x_t | x_0), q(x_t | x_{t-1}), q(x_{t-1} | x_t, x_0) and p_θ(x_{t-1} | x_t), from betas alone.

.. math::
    q(x_t|x_0) = N(\sqrt{ᾱ_t} x_0, (1 - ᾱ_t) I), \qquad q(x_{t-1}|x_t,x_0) = N(μ̃_t, β̃_t I), \\
    μ̃_t = \frac{\sqrt{ᾱ_{t-1}} β_t}{1 - ᾱ_t} x_0 + \frac{\sqrt{α_t} (1 - ᾱ_{t-1})}{1 - ᾱ_t} x_t, \qquad
    p_θ(x_{t-1}|x_t) = N(μ̃_t(x_t, \hat x_0), σ_t^2 I)

(Ho et al. 2020, eqs. 4 to 7). t is an int64 tensor (B,) in 1..T; index 0 of a coefficient is the data, ᾱ_0 = 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion.parameterizations import Epsilon, Parameterization
from diffusion.schedules import check_betas
from diffusion.variances import posterior_variance, small
from losses import DiagGaussian, kl
from losses.gaussian import full_precision


def per_example(values: Tensor, like: Tensor) -> Tensor:
    """Shapes one number per example to multiply ``like``: (B,) -> (B, 1, ..., 1), in its dtype.

    The only place where t meets an image: by hand, (B,) against (B, C, H, W) scales columns silently when B equals W.

    Raises:
        ValueError: for other than one number for each of ``like``'s rows.
    """
    if values.shape != like.shape[:1]:
        raise ValueError(f"t of shape {tuple(values.shape)} is not one step for each of the {len(like)} rows of x")
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


class GaussianDiffusion(nn.Module):
    """A fixed linear-Gaussian q and the reverse chain's form.

    Coefficients are float64 buffers of T + 1 entries, t = 0..T, cast when they meet a tensor, which is widened to float32 if
    it is narrower; ``.half()`` and the like move but never narrow them. They follow from betas: checkpoints hold none.

    Attributes:
        betas: β_t, with betas[0] = 0 for the data.
        alpha_bar: ᾱ_t, falling from ᾱ_0 = 1.
        snr: SNR_t = ᾱ_t / (1 - ᾱ_t), snr[0] = inf.
        epsilon_weight, x0_weight, v_weight: KL_t = weight_t · ‖error‖² for t ≥ 2 and σ_t² = β̃_t; 0 below.

    Args:
        betas: (T,), every one inside (0, 1).
        variance: betas -> σ_t² (T,), :func:`diffusion.small` or :func:`diffusion.large`.

    Raises:
        ValueError: if betas are not a vector inside (0, 1).
    """

    def __init__(self, betas: Tensor, variance: Callable[[Tensor], Tensor] = small) -> None:
        super().__init__()
        betas = torch.as_tensor(betas, dtype=torch.float64).detach()
        if betas.ndim != 1 or not len(betas):
            raise ValueError(f"betas must be a vector of T >= 1 entries, got shape {tuple(betas.shape)}")
        check_betas(betas, "betas", "every beta must lie strictly between 0 and 1")
        self.num_steps = len(betas)
        variances = variance(betas)
        if variances.shape != betas.shape:
            raise ValueError(f"variance must give {len(betas)} numbers, one for each step, got shape {tuple(variances.shape)}")
        if not bool((variances > 0).all()):
            t = int((~(variances > 0)).nonzero()[0]) + 1
            raise ValueError(f"variance gives {variances[t - 1].item()} at t={t}: it must be positive, also for tiny betas")
        for name, value in _coefficients(betas, variances).items():
            self.register_buffer(name, value, persistent=False)
        self._scales = list(zip(self.sqrt_alpha_bar.tolist(), self.noise_std.tolist(), strict=True))

    def _apply(self, fn, recurse: bool = True) -> GaussianDiffusion:
        # Follow the device that fn moves to, whatever dtype it asks for (Apple's GPUs have no float64).
        device = fn(torch.zeros((), device=self.betas.device)).device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        for name, value in self._buffers.items():
            self._buffers[name] = value.to(device, dtype)
        return self

    def at(self, coefficient: Tensor, t: Tensor | int, like: Tensor) -> Tensor:
        """Gathers coefficient[t] and shapes it to multiply ``like``: (B,) -> (B, 1, ..., 1), or one t for all -> ()."""
        if not like.is_floating_point():
            raise TypeError(f"x is {like.dtype}, no floating-point numbers: images of levels go through losses.to_unit first")
        if isinstance(t, int):
            self._check_step(t)
            return coefficient[t].to(like.dtype)
        return per_example(coefficient.index_select(0, t), like)  # half the time of coefficient[t]

    def _check_step(self, t: int) -> None:
        if not 0 <= t <= self.num_steps:
            raise ValueError(f"t={t}: steps are 1..{self.num_steps}, and 0 is the data")

    def scales(self, t: int) -> tuple[float, float]:
        """Returns √ᾱ_t and √(1 - ᾱ_t) as plain numbers: a sampler's step asks for them, and a device is not to be asked."""
        self._check_step(t)
        return self._scales[t]

    def marginal(self, x0: Tensor, t: Tensor | int) -> DiagGaussian:
        """Returns q(x_t | x_0): x0 (B, *), t (B,) in 0..T, or one for all."""
        x0 = full_precision(x0)  # before coefficients meet it: ln σ in bfloat16 moves a step's KL by a hundredth
        return DiagGaussian(self.at(self.sqrt_alpha_bar, t, x0) * x0, self.at(self.log_noise_std, t, x0))

    def step(self, x_prev: Tensor, t: Tensor) -> DiagGaussian:
        """Returns q(x_t | x_{t-1}): x_prev (B, *), t (B,)."""
        x_prev = full_precision(x_prev)
        return DiagGaussian(self.at(self.sqrt_alpha, t, x_prev) * x_prev, self.at(self.log_step_std, t, x_prev))

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> DiagGaussian:
        """Returns q(x_{t-1} | x_t, x_0); at t = 1 that is a point, x_0 itself, with log_std = -inf."""
        x0, x_t = full_precision(x0), full_precision(x_t)
        return DiagGaussian(self._posterior_mean(x0, x_t, t), self.at(self.log_posterior_std, t, x_t))

    def _posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        if x0.shape != x_t.shape:
            raise ValueError(f"x_0 of shape {tuple(x0.shape)} and x_t of {tuple(x_t.shape)} are not of the same images")
        return torch.addcmul(self.at(self.posterior_xt, t, x_t) * x_t, self.at(self.posterior_x0, t, x0), x0)

    def reverse(
        self,
        prediction: Tensor,
        x_t: Tensor,
        t: Tensor,
        parameterization: Parameterization | None = None,
        clip: bool = False,
    ) -> DiagGaussian:
        """Returns p_θ(x_{t-1} | x_t) = N(μ̃_t(x_t, x̂_0), σ_t²).

        Args:
            prediction: the network's output; with the default, ε_θ(x_t, t) (B, *).
            x_t: (B, *).
            t: (B,) in 1..T.
            parameterization: what the prediction is, by default :class:`diffusion.Epsilon`.
            clip: clamps x̂_0 to [-1, 1], as the sampler does.
        """
        x_t = full_precision(x_t)
        x0_hat = (parameterization or Epsilon()).x0(prediction, x_t, t, self)
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)
        return DiagGaussian(self._posterior_mean(x0_hat, x_t, t), self.at(self.log_reverse_std, t, x_t))

    def step_kl(
        self,
        x0: Tensor,
        x_t: Tensor,
        t: Tensor,
        prediction: Tensor,
        parameterization: Parameterization | None = None,
        clip: bool = False,
    ) -> Tensor:
        """Returns KL(q(x_{t-1} | x_t, x_0) ‖ p_θ(x_{t-1} | x_t)) in nats, (B,), for t ≥ 2 (at t = 1 q is a point: infinite)."""
        return kl(self.posterior(x0, x_t, t), self.reverse(prediction, x_t, t, parameterization, clip))

    def prior_kl(self, x0: Tensor) -> Tensor:
        """Returns KL(q(x_T | x_0) ‖ N(0, I)) in nats: (B,)."""
        return kl(self.marginal(x0, self.num_steps), DiagGaussian.standard(x0))


def _coefficients(betas: Tensor, variance: Tensor) -> dict[str, Tensor]:
    """Works out every coefficient in float64, for t = 0..T: (T + 1,) each."""
    zero = betas.new_zeros(1)
    betas_t = torch.cat([zero, betas])
    log_alpha_bar = torch.log1p(-betas_t).cumsum(0)
    noise = torch.expm1(log_alpha_bar).abs()  # 1 - ᾱ_t; abs, as -expm1(0) is -0 and SNR_0 is +inf
    previous_noise = torch.cat([zero, noise[:-1]])
    safe_noise = torch.where(noise > 0, noise, 1.0)
    snr = log_alpha_bar.exp() / noise
    later = torch.arange(len(betas_t)) >= 2
    # SNR_{t-1}/SNR_t - 1, neither a difference of two near numbers nor 0/0 where a long chain's SNR is none
    growth = torch.where(later, betas_t / ((1 - betas_t) * torch.where(later, previous_noise, 1.0)), 0.0)
    return {
        "betas": betas_t,
        "alpha_bar": log_alpha_bar.exp(),
        "snr": snr,
        "sqrt_alpha": (1 - betas_t).sqrt(),
        "sqrt_alpha_bar": (0.5 * log_alpha_bar).exp(),
        "noise_std": noise.sqrt(),
        "log_noise_std": 0.5 * noise.log(),
        "log_step_std": 0.5 * betas_t.log(),
        "log_posterior_std": 0.5 * torch.cat([zero, posterior_variance(betas)]).log(),
        "log_reverse_std": 0.5 * torch.cat([zero, variance]).log(),
        "posterior_x0": (0.5 * torch.cat([zero, log_alpha_bar[:-1]])).exp() * betas_t / safe_noise,
        "posterior_xt": (1 - betas_t).sqrt() * previous_noise / safe_noise,
        "x0_weight": torch.where(later, 0.5 * growth * snr, 0.0),
        "epsilon_weight": 0.5 * growth,
        "v_weight": 0.5 * growth * log_alpha_bar.exp(),
    }
