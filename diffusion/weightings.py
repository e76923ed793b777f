"""What a training step minimises at step t, per example: a function of the network's output, never of the reported bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from losses import sum_except_batch


@dataclass(frozen=True, eq=False)
class StepTerms:
    """What one drawn step of every image gives.

    Attributes:
        term: this step's share of -ELBO, t ≥ 2 its KL and t = 1 its -ln p(x_0 | x_1): (B,), nats.
        prior: KL(q(x_T|x_0) ‖ p(x_T)): (B,), nats.
        noise: ε, (B, C, H, W).
        predict_noise: gives ε̂, which the bound itself does not need.
        num_steps: T.
    """

    term: Tensor
    prior: Tensor
    noise: Tensor
    predict_noise: Callable[[], Tensor]
    num_steps: int

    @cached_property
    def noise_hat(self) -> Tensor:
        """ε̂, (B, C, H, W), worked out when it is first asked for."""
        return self.predict_noise()


def simple(terms: StepTerms) -> Tensor:
    """‖ε - ε̂‖²: L_simple (Ho et al. 2020, eq. 14), (B,). Not a bound: it weighs the noisy steps up."""
    return sum_except_batch((terms.noise - terms.noise_hat).square())


def elbo(terms: StepTerms) -> Tensor:
    """T times the step's share, and the prior term: for a uniform t an unbiased estimate of -ELBO, (B,), nats."""
    return terms.num_steps * terms.term + terms.prior
