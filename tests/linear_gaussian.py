"""x_0 ~ N(0, s²) and a linear predictor ε_θ = c_t x: every term of the bound in closed form, worked out in plain Python.

Written from the formulas alone, with Python floats and no code of the project: an oracle.
"""

from __future__ import annotations

import math


def optimal(alpha_bar: float, s2: float) -> float:
    return math.sqrt(1 - alpha_bar) / (alpha_bar * s2 + 1 - alpha_bar)


def elbo_terms(betas: list[float], s2: float, factors: list[float] | None = None) -> tuple[float, float, float]:
    """Returns (reconstruction, prior, matching) per dimension, nats; ε_θ(x, t) = factors[t-1] · x, by default optimal."""
    alpha_bars, product = [1.0], 1.0
    for beta in betas:
        product *= 1 - beta
        alpha_bars.append(product)
    c = factors or [optimal(a, s2) for a in alpha_bars[1:]]
    matching = 0.0
    tilde = [0.0] + [betas[t - 1] * (1 - alpha_bars[t - 1]) / (1 - alpha_bars[t]) for t in range(1, len(betas) + 1)]
    for t in range(2, len(betas) + 1):
        a, noise = alpha_bars[t], 1 - alpha_bars[t]
        # E(ε - c x_t)² with x_t = √a x_0 + √(1-a) ε
        error = (1 - c[t - 1] * math.sqrt(noise)) ** 2 + c[t - 1] ** 2 * a * s2
        matching += betas[t - 1] ** 2 / (2 * tilde[t] * (1 - betas[t - 1]) * noise) * error
    sigma2 = tilde[2] if len(betas) > 1 else betas[0]
    a, noise = alpha_bars[1], 1 - alpha_bars[1]
    # μ_θ = (x_1 - √(1-a) c x_1)/√a
    k = (1 - math.sqrt(noise) * c[0]) / math.sqrt(a)
    square = (1 - k * math.sqrt(a)) ** 2 * s2 + k * k * noise
    reconstruction = -0.5 * math.log(2 * math.pi * sigma2) - square / (2 * sigma2)
    last = alpha_bars[-1]
    prior = 0.5 * (last * s2 + (1 - last) - 1 - math.log(1 - last))
    return reconstruction, prior, matching
