r"""How a chain is walked from x_T down to x_1 once x̂_0 can be predicted: every step of it, or some.

Both are moves from x_t to x_s, s < t, by a Gaussian whose mean is linear in x̂_0 and x_t. Ancestral sampling draws from
p_θ(x_{t-1}|x_t), the chain that the bound belongs to. DDIM (Song et al. 2021, "Denoising Diffusion Implicit Models", eq. 12)
keeps every q(x_t|x_0) and leaves out steps:

.. math::
    x_s = \sqrt{ᾱ_s} \hat x_0 + \sqrt{1 - ᾱ_s - σ^2}\, \frac{x_t - \sqrt{ᾱ_t} \hat x_0}{\sqrt{1 - ᾱ_t}} + σ z, \qquad
    σ^2 = η^2 \frac{1 - ᾱ_s}{1 - ᾱ_t} \left(1 - \frac{ᾱ_t}{ᾱ_s}\right)

With η = 1 and s = t - 1 the two agree where σ_t² = β̃_t. The step from x_1 to x_0 is left to the likelihood in either case.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diffusion.process import GaussianDiffusion
from losses.checks import is_whole
from losses.draws import randn_like
from losses.gaussian import full_precision


@dataclass(frozen=True)
class Move:
    """x_s = x0 · x̂_0 + xt · x_t + std · z.

    Attributes:
        t, s: from where, and to where.
        x0, xt: what multiplies x̂_0 and x_t.
        std: of the noise that is added.
    """

    t: int
    s: int
    x0: float
    xt: float
    std: float

    def __call__(self, x0_hat: Tensor, x_t: Tensor, clip: bool = False) -> Tensor:
        """Draws x_s: x0_hat (B, *), clamped to [-1, 1] if ``clip``, x_t (B, *) -> (B, *)."""
        x0_hat = full_precision(x0_hat)
        scaled = x0_hat.clamp(-1, 1).mul_(self.x0) if clip else self.x0 * x0_hat
        mean = scaled.add_(x_t, alpha=self.xt)
        return mean.add_(randn_like(mean), alpha=self.std) if self.std else mean


def ancestral(process: GaussianDiffusion) -> list[Move]:
    """Returns every step of p_θ, from t = T to x_1 (Ho et al. 2020, algorithm 2)."""
    x0, xt, std = (values.tolist() for values in (process.posterior_x0, process.posterior_xt, process.log_reverse_std.exp()))
    return [Move(t, t - 1, x0[t], xt[t], std[t]) for t in range(process.num_steps, 1, -1)]


def check_moves(moves: list[Move], num_steps: int) -> None:
    """Refuses what is no way from x_T down to x_1.

    Raises:
        ValueError: if a move is none, or does not begin where the one before it has ended.
    """
    if not isinstance(moves, (list, tuple)):
        raise ValueError(f"model.sampler gives {type(moves).__name__}, not a list of diffusion.samplers.Move")
    if others := [move for move in moves if not isinstance(move, Move)]:
        raise ValueError(f"model.sampler gives a list with {type(others[0]).__name__} in it, not of diffusion.samplers.Move")
    ends = [num_steps, *(move.s for move in moves)]
    if [move.t for move in moves] != ends[:-1] or ends[-1] != 1:
        way = ", ".join(f"{move.t} to {move.s}" for move in moves[:3]) or "nowhere"
        raise ValueError(f"model.sampler goes from {way}{', ...' * (len(moves) > 3)}: moves must lead from T={num_steps} to 1")


def ddim_move(process: GaussianDiffusion, t: int, s: int, eta: float) -> Move:
    """Returns DDIM's move from x_t to x_s, T ≥ t > s ≥ 0."""
    signal, before = process.alpha_bar[t].item(), process.alpha_bar[s].item()
    noise, noise_before = process.noise_std[t].item() ** 2, process.noise_std[s].item() ** 2  # 1 - ᾱ loses digits near 0
    drop = -torch.log1p(-process.betas[s + 1 : t + 1]).sum().expm1().item()  # 1 - ᾱ_t/ᾱ_s, also where both are 0
    variance = eta**2 * noise_before / noise * drop
    xt = (max(0.0, noise_before - variance) / noise) ** 0.5
    return Move(t, s, before**0.5 - xt * signal**0.5, xt, variance**0.5)


def ddim(process: GaussianDiffusion, num_steps: int = 50, eta: float = 0.0) -> list[Move]:
    """Returns the moves of DDIM.

    Args:
        process: the chain.
        num_steps: network calls for an image, the last one at t = 1: evenly spread over 1..T, all T if there are fewer.
        eta: η in [0, 1]: from no noise to the variance of q(x_s|x_t, x_0), which from t to t - 1 is β̃_t.

    Raises:
        ValueError: for a setting out of range.
    """
    if not is_whole(num_steps, 2):
        raise ValueError(f"model.sampler.num_steps={num_steps!r} must be an integer of at least 2: one at t = T, one at t = 1")
    if not 0 <= eta <= 1:
        raise ValueError(f"model.sampler.eta={eta} must lie in [0, 1]: 0 adds no noise, 1 as much as q(x_s|x_t, x_0) has")
    spread = torch.linspace(process.num_steps, 1, min(num_steps, process.num_steps), dtype=torch.float64)
    return [ddim_move(process, t, s, eta) for t, s in pairwise(spread.round().int().tolist())]
