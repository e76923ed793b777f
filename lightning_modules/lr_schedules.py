"""Learning-rate factors by optimiser step: (step, total steps) -> factor of the optimiser's learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass


def _check_warmup(warmup_steps: int) -> None:
    if warmup_steps < 0:
        raise ValueError(f"model.lr_scheduler.warmup_steps={warmup_steps} must be at least 0 (0 is no warm-up)")


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))


@dataclass(frozen=True)
class Constant:
    """Rises linearly over ``warmup_steps``, then stays (Ho et al. 2020's published code)."""

    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_steps)

    def __call__(self, step: int, total_steps: float) -> float:
        """Returns the factor at ``step`` (0 is the first)."""
        return _warmup(step, self.warmup_steps)


@dataclass(frozen=True)
class WarmupCosine:
    """Rises linearly over ``warmup_steps``, then falls as half a cosine, to reach ``final_fraction`` when training is over.

    Raises:
        ValueError: if the length of training is unknown, when called.
    """

    warmup_steps: int = 0
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_steps)
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"model.lr_scheduler.final_fraction={self.final_fraction} must lie between 0 and 1")

    def __call__(self, step: int, total_steps: float) -> float:
        """Returns the factor at ``step`` (0 is the first)."""
        if math.isinf(total_steps):
            raise ValueError(
                "model/lr_scheduler=warmup_cosine needs to know how long training lasts: set trainer.max_epochs or "
                "trainer.max_steps, or choose model/lr_scheduler=constant"
            )
        progress = min(1.0, max(0, step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        cosine = self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
        return _warmup(step, self.warmup_steps) * cosine
