"""Means and standard errors of the ELBO's terms over a data set, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from losses import Elbo
from losses.elbo import SIGNS

TERMS = ("elbo", *SIGNS)


def stacked(elbo: Elbo) -> Tensor:
    """Returns the bound and its terms in the order of :data:`TERMS`, without a gradient: (4, B), nats."""
    return torch.cat([elbo.value.unsqueeze(0), elbo.terms()]).detach()


class ElboMetric(Metric):
    """Sums of nats, of squares and of examples, reduced over ranks and only then divided: uneven batches weigh right."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name, size in (("total", len(TERMS)), ("square", len(TERMS)), ("count", 1)):
            self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **settings: Any) -> ElboMetric:
        """Moves the sums to where ``fn`` moves a tensor, in float32 to Apple's GPUs, which have no float64."""
        if fn(torch.zeros(1)).device.type == "mps":
            for name, default in self._defaults.items():
                self._defaults[name] = default.float()
                setattr(self, name, getattr(self, name).float())
        return super()._apply(fn, *args, **settings)

    def update(self, elbo: Elbo) -> None:
        """Adds a batch of per-example terms."""
        terms = stacked(elbo).to(self.total.dtype)
        # not in place: sums that trainer.validate has made are inference tensors, which trainer.fit could not change
        self.total = self.total + terms.sum(1)
        self.square = self.square + terms.square().sum(1)
        self.count = self.count + terms.shape[1]

    def compute(self) -> dict[str, Tensor]:
        """Returns {term: mean, term_se: its standard error over examples, NaN for one}, nats per example, and their "count"."""
        mean = self.total / self.count
        variance = (self.square / self.count - mean.square()).clamp(min=0) * self.count / (self.count - 1)
        error = (variance / self.count).sqrt()
        means = dict(zip(TERMS, mean.unbind(), strict=True))
        errors = {f"{name}_se": value for name, value in zip(TERMS, error.unbind(), strict=True)}
        return means | errors | {"count": self.count.squeeze()}
