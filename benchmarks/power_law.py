"""Power laws y = a·x^b, and above a fixed cost y = c + a·x^b, fitted by least squares on logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares


@dataclass(frozen=True)
class PowerLaw:
    """y = fixed + scale · x^exponent.

    Attributes:
        scale: y - fixed at x = 1.
        exponent: slope of ln(y - fixed) over ln x.
        error: its standard error, from what the points leave of the curve; NaN where as many numbers were fitted as points.
        fixed: what y has at x = 0.
    """

    scale: float
    exponent: float
    error: float
    fixed: float = 0.0

    def __call__(self, x: float) -> float:
        """Returns y."""
        return self.fixed + self.scale * x**self.exponent

    def __str__(self) -> str:
        """Exponent and its standard error."""
        exponent = f"{self.exponent:.2f}".replace("-0.00", "0.00")
        return exponent if math.isnan(self.error) else f"{exponent} ± {self.error:.2f}"


def fit(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Fits y (n,) over x (n,), both positive, by a power law without anything fixed.

    Raises:
        ValueError: for fewer than two points, or one that is not positive.
    """
    if len(x) != len(y) or len(x) < 2 or min(*x, *y) <= 0:
        raise ValueError(f"a power law needs two or more positive points, got x = {list(x)} and y = {list(y)}")
    u, v = np.log(np.asarray(x, dtype=float)), np.log(np.asarray(y, dtype=float))
    centred = u - u.mean()
    spread = float(centred @ centred)
    exponent = float(centred @ v) / spread
    residuals = v - v.mean() - exponent * centred
    free = len(u) - 2
    error = math.sqrt(float(residuals @ residuals) / free / spread) if free else math.nan
    return PowerLaw(math.exp(v.mean() - exponent * u.mean()), exponent, error)


def fit_above(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """Fits y by a power law above a fixed cost ≥ 0, both on logarithms; ``None`` if y does not grow, or has under five points.

    Raises:
        ValueError: as :func:`fit`.
    """
    start = fit(x, y)
    if len(x) < 5 or start.exponent < 0.1:
        return None
    u, v = np.log(np.asarray(x, dtype=float)), np.log(np.asarray(y, dtype=float))
    least = float(min(y))

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.log(least * p[2] + np.exp(p[0] + p[1] * u)) - v

    bounds = ([-np.inf, 0, 0], [np.inf, np.inf, 1])
    found = least_squares(residuals, [v[-1] - u[-1], 1.0, 0.5], bounds=bounds, x_scale="jac", xtol=1e-12, ftol=1e-12)
    kept = slice(0, 3 if found.x[2] > 1e-6 else 2)  # at its bound, nothing fixed was found
    jacobian = found.jac[:, kept]
    covariance = np.linalg.inv(jacobian.T @ jacobian) * 2 * found.cost / (len(u) - jacobian.shape[1])
    return PowerLaw(math.exp(found.x[0]), float(found.x[1]), math.sqrt(covariance[1, 1]), least * float(found.x[2]))
