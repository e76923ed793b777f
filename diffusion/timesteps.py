"""Which t a training step draws: (batch size, T, device) -> t (B,) int64 in 1..T, each uniform on its own.

Both keep the loss unbiased; they differ in how evenly one batch covers the steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losses.draws import rand, stratified


def uniform(batch_size: int, num_steps: int, device: torch.device) -> Tensor:
    """Draws every t independently (Ho et al. 2020, algorithm 1)."""
    return (rand((batch_size,), device) * num_steps).long().clamp(max=num_steps - 1) + 1


def low_discrepancy(batch_size: int, num_steps: int, device: torch.device) -> Tensor:
    """Spreads the global batch evenly over 1..T with one random shift (Kingma et al. 2021, appendix I.1)."""
    return (stratified(batch_size, device) * num_steps).long().clamp(max=num_steps - 1) + 1
