r"""Noise schedules: num_steps -> betas (T,) in float64, for t = 1..T.

α_t = 1 - β_t; ᾱ_t = Π_{s≤t} α_s; SNR_t = ᾱ_t / (1 - ᾱ_t). The same name means different things in different code bases,
so each function states its formula. Schedules given by ᾱ use β_t = 1 - ᾱ_t/ᾱ_{t-1}, at most 0.999 where ᾱ_T = 0.
Every function raises ``ValueError`` in one sentence when a setting gives a β outside (0, 1).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.checks import is_whole

BETA_MAX = 0.999  # Nichol & Dhariwal 2021, section 3.2: "to prevent singularities at the end"
ENDS = "choose beta_start and beta_end inside (0, 1)"


def check_num_steps(num_steps: int) -> None:
    """Refuses numbers of steps that are no positive integer.

    Raises:
        ValueError: if ``num_steps`` is not an integer ≥ 1.
    """
    if not is_whole(num_steps, 1):
        raise ValueError(
            f"num_steps (T) must be an integer of at least 1, got {num_steps!r}: T = 1 is a VAE with a fixed encoder"
        )


def check_betas(betas: Tensor, name: str, advice: str, **settings: float) -> Tensor:
    """Returns betas, or refuses them when one lies outside (0, 1) or is not finite.

    Args:
        betas: of t = 1..T.
        name: of the schedule.
        advice: a way out.
        settings: those to blame.

    Raises:
        ValueError: naming all of these.
    """
    bad = ~((betas > 0) & (betas < 1))
    if bad.any():
        t = int(bad.nonzero()[0]) + 1
        given = ", ".join(f"{setting}={value!r}" for setting, value in settings.items())
        raise ValueError(f"schedule={name} with {given} gives beta_{t} = {betas[t - 1].item():.4g}, outside (0, 1): {advice}")
    return betas


def linear(num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02, rescale: bool = True) -> Tensor:
    """β_t = linspace(beta_start, beta_end, T), both ends times 1000/T when ``rescale`` (Ho et al. 2020, T = 1000).

    Rescaled, ᾱ_T stays small for every T, but β_T = 20/T reaches 1 at T = 20: T ≤ 20 are refused.
    """
    check_num_steps(num_steps)
    stretch = 1000 / num_steps if rescale else 1.0
    betas = torch.linspace(beta_start * stretch, beta_end * stretch, num_steps, dtype=torch.float64)
    advice = "the ends are stretched by 1000/T, so take more steps, model.schedule.rescale=false or model/schedule=cosine"
    inside = 0 < beta_start < 1 and 0 < beta_end < 1
    if rescale and stretch * beta_end >= 1:  # at T = 1 linspace holds the start only, which hides the end
        betas[-1] = stretch * beta_end
    if rescale and inside:
        return check_betas(betas, "linear", advice, num_steps=num_steps)
    return check_betas(betas, "linear", ENDS, beta_start=beta_start, beta_end=beta_end)


def scaled_linear(num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """β_t = linspace(√beta_start, √beta_end, T)², also called "quad" (Song et al. 2021, DDIM; latent diffusion)."""
    check_num_steps(num_steps)
    if beta_start <= 0 or beta_end <= 0:
        raise ValueError(
            f"schedule=scaled_linear needs beta_start and beta_end in (0, 1), got {beta_start=!r} and {beta_end=!r}"
        )
    betas = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_steps, dtype=torch.float64).square()
    return check_betas(betas, "scaled_linear", ENDS, beta_start=beta_start, beta_end=beta_end)


def cosine(num_steps: int, s: float = 0.008) -> Tensor:
    """ᾱ(u) = cos²((u + s)/(1 + s) · π/2), normalised by ᾱ(0), u = t/T; β_t ≤ 0.999 (Nichol & Dhariwal 2021, eq. 17)."""
    check_num_steps(num_steps)
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((u + s) / (1 + s) * math.pi / 2).square()
    return check_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=BETA_MAX), "cosine", "choose another s", s=s)


def sigmoid(num_steps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Tensor:
    """ᾱ(u) = (σ(end/τ) - σ((u (end - start) + start)/τ)) / (σ(end/τ) - σ(start/τ)), σ logistic (Jabri et al. 2022)."""
    if not tau > 0 or not end > start:
        raise ValueError(f"schedule=sigmoid needs start < end and tau > 0, got start={start!r}, end={end!r}, tau={tau!r}")
    check_num_steps(num_steps)
    at = torch.linspace(start, end, num_steps + 1, dtype=torch.float64) / tau
    # σ(b) - σ(a) = σ(b) σ(-a) (1 - e^{a-b}), so β_t = (σ(b_t) - σ(b_{t-1})) / (σ(end/τ) - σ(b_{t-1})) without a cancellation
    gate = F.logsigmoid(at)
    betas = torch.exp(gate[1:] - gate[-1]) * torch.expm1(-torch.diff(at)) / torch.expm1(at[:-1] - at[-1])
    return check_betas(betas.clamp(max=BETA_MAX), "sigmoid", "choose others", start=start, end=end, tau=tau)


def log_snr_linear(num_steps: int, log_snr_max: float = 6.5, log_snr_min: float = -9.0) -> Tensor:
    """Ln SNR_t = linspace(log_snr_max, log_snr_min, T), so ᾱ_t = σ(ln SNR_t), σ logistic (Kingma et al. 2021, VDM-like).

    A first noise far below one level's width spends steps where there is nothing to learn: match ``log_snr_max`` to the
    number of levels. T = 1 takes ``log_snr_max``.
    """
    check_num_steps(num_steps)
    if not log_snr_max > log_snr_min:
        raise ValueError(f"schedule=log_snr_linear needs log_snr_max > log_snr_min, got {log_snr_max=!r} and {log_snr_min=!r}")
    log_alpha_bar = F.logsigmoid(torch.linspace(log_snr_max, log_snr_min, num_steps, dtype=torch.float64))
    betas = -torch.expm1(torch.diff(log_alpha_bar, prepend=log_alpha_bar.new_zeros(1)))
    return check_betas(betas, "log_snr_linear", "choose them nearer to 0", log_snr_max=log_snr_max, log_snr_min=log_snr_min)


def constant(num_steps: int, beta: float = 0.02) -> Tensor:
    """β_t = beta for every t, not rescaled (Ho et al. 2020's code, "const")."""
    check_num_steps(num_steps)
    betas = torch.full((num_steps,), float(beta), dtype=torch.float64)
    return check_betas(betas, "constant", "choose it inside (0, 1)", beta=beta)


def jsd(num_steps: int) -> Tensor:
    """β_t = 1/(T - t + 1), the last one 0.999 in place of 1 (Sohl-Dickstein et al. 2015, binomial diffusion)."""
    check_num_steps(num_steps)
    return (1 / torch.arange(num_steps, 0, -1, dtype=torch.float64)).clamp(max=BETA_MAX)
