"""How large each step's KL is, and the proposal over steps that follows from it.

Summing over every t costs T network calls an image. The first few steps hold most of the bound, so drawing t with
p_t ∝ √E[KL_t²], which minimises the variance of KL_t/p_t, needs few. Any p_t > 0 is unbiased; a good one is only cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

UNIFORM_SHARE = 0.1  # of the proposal, so that no p_t vanishes however wrong the profile is
MEMORY = 0.5  # what each refresh keeps of the sums: steps that training now changes are forgotten in a few refreshes


def _outside_inference(function: Callable[..., Any]) -> Callable[..., Any]:
    """Has a function make tensors that may be added to later: those of inference mode may not, outside of it."""
    return torch.inference_mode(False)(torch.no_grad()(function))


class StepProfile(nn.Module):
    """Running second moments of KL_t, t = 2..T, and the proposal that follows from them.

    Attributes:
        proposal: p_t for t = 0..T, (T + 1,) float32, zero for t < 2; uniform until steps have been recorded.

    Args:
        num_steps: T.
    """

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.register_buffer("proposal", uniform_proposal(num_steps))
        # no buffers: DDP would overwrite every rank's sums by rank 0's
        self._sums: Tensor | None = None
        self._fading = False  # whether the sums have been used, and fade before the next is added

    @_outside_inference
    def record(self, t: Tensor, step_kl: Tensor) -> None:
        """Adds draws of KL_t: t (B,), step_kl (B,) nats; entries at t < 2 are ignored later, and squares that overflow now."""
        if self._sums is None:
            self._sums = torch.zeros(2, len(self.proposal), dtype=torch.float32, device=t.device)
        elif self._sums.device != t.device:  # the model was moved
            self._sums = self._sums.to(t.device)
        if self._fading:
            self._sums *= MEMORY
            self._fading = False
        square = step_kl.float().square()
        finite = square < math.inf  # nor NaN
        self._sums[0].index_add_(0, t, torch.where(finite, square, 0.0))
        self._sums[1].index_add_(0, t, finite.float())

    @_outside_inference
    def share(self, strategy) -> Tensor | None:
        """Gives rank 0 the sums of all ranks, for its checkpoint to hold them, and returns them (``strategy.reduce`` adds up).

        The others begin anew. ``None`` before anything is recorded. Every rank must call this.
        """
        if self._sums is None:
            return None
        total = strategy.reduce(self._sums.to(self.proposal.device, copy=True), reduce_op="sum")
        self._sums = total.clone() if strategy.is_global_zero else torch.zeros_like(total)
        return total

    @_outside_inference
    def refresh(self, strategy) -> None:
        """Makes the proposal from what all ranks recorded; does nothing before that, and the same twice in a row."""
        total = self.share(strategy)
        if total is None:
            return
        square, count = total
        self._fading = True
        seen = (count[2:] > 0) & square[2:].isfinite()  # a sum of finite ones may still overflow
        if not seen.any():
            return
        root = (square[2:] / count[2:].clamp(min=1e-12)).sqrt()
        self.proposal.copy_(proposal_from(torch.where(seen, root, root[seen].mean())))

    def recorded(self) -> dict[str, object]:
        """Returns what a resumed run needs beside the proposal: a copy of this rank's sums."""
        return {"sums": None if self._sums is None else self._sums.clone(), "fading": self._fading}

    def restore(self, recorded: dict[str, object], strategy) -> None:
        """Takes what :meth:`recorded` returned on rank 0."""
        sums = recorded["sums"]
        if sums is not None:
            self._sums = sums if strategy.is_global_zero else torch.zeros_like(sums)
        self._fading = recorded["fading"]


def proposal_from(root_mean_squares: Tensor, uniform_share: float = UNIFORM_SHARE) -> Tensor:
    """Returns p_t ∝ √E[KL_t²], mixed with a uniform share: (T - 1,) for t = 2..T -> (T + 1,), zero for t < 2."""
    share = root_mean_squares / root_mean_squares.sum().clamp(min=1e-12)
    proposal = (1 - uniform_share) * share + uniform_share / max(1, len(share))
    return torch.nn.functional.pad(proposal / proposal.sum(), (2, 0))


def uniform_proposal(num_steps: int) -> Tensor:
    """Returns p_t = 1/(T - 1) for t = 2..T: (T + 1,) float32, zero for t < 2."""
    proposal = torch.zeros(num_steps + 1)
    proposal[2:] = 1 / max(1, num_steps - 1)
    return proposal


def draw_steps(proposal: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Maps uniform numbers to (t, p_t) by the inverse of the cumulated proposal: (T + 1,), cells (B, K) in [0, 1)."""
    proposal = proposal.to(cells)
    cumulated = proposal.cumsum(0)
    t = torch.searchsorted(cumulated, cells * cumulated[-1], right=True).clamp(2, len(proposal) - 1)
    return t, proposal[t] / cumulated[-1]
