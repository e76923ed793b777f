r"""The likelihood of a DDPM's probability flow: a different model's likelihood, by a different protocol than the ELBO's.

The reverse chain's deterministic twin (Song et al. 2021, "Score-based generative modeling through SDEs", eqs. 13 and 39), with
λ = ln SNR as the time, which a schedule gives at t = 1..T and a monotone cubic in between:

.. math::
    dx/dλ = ½ ((1 - ᾱ) x - \sqrt{1 - ᾱ}\, ε̂(x, t(λ))), \qquad ᾱ = σ(λ)

    \ln p(x_1) = \ln N(x_T; 0, I) + ∫ \mathrm{div}\, dλ \text{ along the path from } λ_1 \text{ to } λ_T

Data enter at t = 1 as x_1 = √ᾱ_1 y. Pixels are dequantised uniformly, y = unit(k + u - ½), and their bins' width is added:
ln P(k) ≥ E_u ln p(y) + D ln(2/(L - 1)). The noise of x_1 itself is left out, as in the original.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from lightning_modules import DDPMLightningModule
from losses import DiagGaussian
from losses.draws import rand, randn_like


@dataclass(frozen=True, eq=False)
class _Moment:
    """Coefficients at one real time, in the form in which parameterizations ask a process for them."""

    sqrt_alpha_bar: Tensor
    noise_std: Tensor
    log_noise_std: Tensor

    @classmethod
    def at_log_snr(cls, value: float, device: torch.device) -> _Moment:
        log_snr = torch.tensor(value, dtype=torch.float64)
        log_signal, log_noise = (0.5 * torch.nn.functional.logsigmoid(sign * log_snr) for sign in (1, -1))
        return cls(*(part.to(device) for part in (log_signal.exp(), log_noise.exp(), log_noise)))

    def at(self, coefficient: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """Returns the coefficient, whatever t."""
        return coefficient.to(like.dtype)


class ProbabilityFlow:
    """The flow of one model.

    Args:
        model: a DDPM.
        tolerance: of the solver (scipy's adaptive RK45), absolute and relative, at each step: what it adds up to
            is not known from it.
        exact_up_to: the largest D whose divergence is summed exactly, one backward pass for each dimension; above it one
            Rademacher probe a dequantisation estimates it, unbiased (Hutchinson 1990).
    """

    def __init__(self, model: DDPMLightningModule, tolerance: float = 1e-5, exact_up_to: int = 256) -> None:
        self.model, self.tolerance = model, tolerance
        self.exact = model.num_dims <= exact_up_to
        log_alpha_bar = torch.log1p(-model.process.betas[1:].double().cpu()).cumsum(0)
        self.log_snr = (log_alpha_bar - torch.expm1(log_alpha_bar).neg().log()).numpy()  # where SNR itself is 0, too
        steps = np.arange(1.0, model.num_steps + 1)
        # as a function of falling λ; one step alone has no flow
        self.time = PchipInterpolator(self.log_snr[::-1], steps[::-1]) if len(steps) > 1 else None
        self.evaluations = 0

    def describe(self) -> dict[str, object]:
        """Returns what a reader must know."""
        divergence = "exact" if self.exact else "Hutchinson's estimate, one Rademacher probe"
        dequantised = "" if self.model.levels is None else ", uniform dequantisation"
        protocol = (
            f"probability-flow ODE of the trained chain{dequantised}: another model (deterministic) and another protocol than "
            "the ELBO's, not a bound on the same likelihood"
        )
        return {"protocol": protocol, "divergence": divergence, "tolerance_per_step": self.tolerance, "solver": "scipy RK45"}

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Returns ln P of levels, or ln p of continuous data, with one dequantisation each: x (B, C, H, W) -> (B,), nats.

        NaN where the solver could not follow the paths of this batch to their end.
        """
        model = self.model
        y = x.double()
        volume = 0.0
        if model.levels is not None:
            u = rand(tuple(x.shape), x.device, torch.float64)
            y = (2 * (y + u - 0.5) - (model.levels - 1)) / (model.levels - 1)
            volume = math.log(2 / (model.levels - 1))
        signs = torch.sign(randn_like(y))
        x_1 = model.process.sqrt_alpha_bar[1].double() * y
        # dx_1 = √ᾱ_1 dy
        scale = model.process.sqrt_alpha_bar[1].double().log()
        x_last, divergence = self._integrate(x_1, signs)
        log_p = DiagGaussian.standard(x_last).log_prob(x_last) + divergence
        return log_p + model.num_dims * (scale + volume)

    def _integrate(self, x_1: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        if self.time is None:
            return x_1, x_1.new_zeros(len(x_1))
        size = x_1.numel()

        def slope(log_snr: float, state: np.ndarray) -> np.ndarray:
            x = torch.from_numpy(state[:size]).view_as(x_1).to(x_1.device)
            self.evaluations += 1
            drift, divergence = self._drift(x, float(log_snr), signs)
            values = torch.cat([drift.flatten(), divergence]).cpu().numpy()
            if not np.isfinite(values).all():  # with which the solver would choose its first step for ever
                raise FloatingPointError
            return values

        start = np.concatenate([x_1.flatten().cpu().numpy(), np.zeros(len(x_1))])
        ends = (self.log_snr[0], self.log_snr[-1])
        try:
            solution = solve_ivp(slope, ends, start, method="RK45", rtol=self.tolerance, atol=self.tolerance)
        except FloatingPointError:
            solution = None
        if not (solution and solution.success):  # a path leaves all bounds, of a badly trained model; no error: ranks wait
            return torch.full_like(x_1, torch.nan), x_1.new_full((len(x_1),), torch.nan)
        end = torch.from_numpy(solution.y[:, -1]).to(x_1.device)
        return end[:size].view_as(x_1), end[size:]

    def _drift(self, x: Tensor, log_snr: float, signs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns dx/dλ (B, C, H, W) and its divergence (B,), float64."""
        with torch.inference_mode(False), torch.enable_grad():  # tensors of inference mode cannot be differentiated
            moment = _Moment.at_log_snr(log_snr, x.device)
            t = torch.full((len(x),), float(self.time(log_snr)), device=x.device).clamp(1, self.model.num_steps)
            x, signs = x.clone(), signs.clone()
            inputs = x.clone().requires_grad_()
            narrow = inputs.to(torch.promote_types(torch.float32, self.model.dtype))
            noise = self.model.parameterization.epsilon(self.model.network(narrow, t), narrow, t, moment).double()
            if self.exact:
                flat = noise.flatten(1)
                traces = [
                    torch.autograd.grad(flat[:, i].sum(), inputs, retain_graph=True)[0].flatten(1)[:, i]
                    for i in range(flat.shape[1])
                ]
                trace = torch.stack(traces).sum(0)
            else:
                (product,) = torch.autograd.grad((noise * signs).sum(), inputs)
                trace = (product * signs).flatten(1).sum(1)
        std = moment.noise_std
        drift = 0.5 * (std.square() * x - std * noise.detach())
        return drift, 0.5 * (std.square() * self.model.num_dims - std * trace.detach())
