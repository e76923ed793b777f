"""Means and standard errors of the ELBO's terms over a data set, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torchmetrics import Metric

from losses import Elbo
from losses.elbo import SIGNS

TERMS = ("elbo", *SIGNS)
MOST_KEPT = 64  # batches


def stacked(elbo: Elbo) -> Tensor:
    """Returns the bound and its terms in the order of :data:`TERMS`, without a gradient: (4, B), nats."""
    return torch.cat([elbo.value.unsqueeze(0), elbo.terms()]).detach()


class TrainingTerms:
    """The loss and the bound's terms of training, batch by batch, until a row of their means is written.

    A batch is kept as it is, and added up with others when there are many, or the means are asked for: an addition in every
    step would cost more than all of them together.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Elbo]] = []
        self._sums: Tensor | None = None  # of the loss over batches, and of the terms over images
        self._batches = self._images = 0

    def add(self, loss: Tensor, elbo: Elbo) -> None:
        """Adds a batch: loss (), terms (B,)."""
        terms = (getattr(elbo, name).detach() for name in SIGNS)
        self._kept.append((loss.detach(), Elbo(*terms)))
        if len(self._kept) == MOST_KEPT:
            self._add_up()

    def _add_up(self) -> None:
        if not self._kept:
            return
        losses, elbos = zip(*self._kept, strict=True)
        together = stacked(Elbo(*(torch.cat([getattr(elbo, name) for elbo in elbos]) for name in SIGNS)))
        # in float64, or a run that went on would have other last digits: where batches are added up depends on where it stopped
        dtype = torch.float32 if together.device.type == "mps" else torch.float64
        sums = torch.cat([torch.stack(losses).sum(0, keepdim=True, dtype=dtype), together.sum(1, dtype=dtype)])
        self._sums = sums if self._sums is None else self._sums.to(sums.device) + sums
        self._batches, self._images = self._batches + len(losses), self._images + together.shape[1]
        self._kept = []

    def means(self) -> Tensor:
        """Returns the mean loss, and the means of :data:`TERMS` over this rank's images, nats: (5,) float32."""
        self._add_up()
        return torch.cat([self._sums[:1] / self._batches, self._sums[1:] / self._images]).float()

    def share(self, strategy: Strategy) -> None:
        """Gives every rank, and so the next checkpoint, the mean of all ranks' sums."""
        self._add_up()
        if self._sums is not None:
            self._sums = strategy.reduce(self._sums.to(strategy.root_device), reduce_op="mean")

    def recorded(self, ranks: int) -> dict[str, Any]:
        """Returns what :meth:`restored` takes, of one of so many ranks that hold as many images each."""
        self._add_up()
        return {"sums": self._sums, "batches": self._batches, "images": self._images, "ranks": ranks}

    @classmethod
    def restored(cls, recorded: dict[str, Any] | None, ranks: int) -> TrainingTerms:
        """Returns one, of so many, that goes on with what another training has added up; with nothing without a record of it.

        Each of fewer ranks holds more images of every batch to come, and so of those before, or these would weigh less.
        """
        terms = cls()
        if recorded is not None:
            more = recorded.get("ranks", ranks) / ranks
            terms._batches, terms._images = recorded["batches"], recorded["images"] * more
            if recorded["sums"] is not None:
                terms._sums = torch.cat([recorded["sums"][:1], recorded["sums"][1:] * more])
        return terms


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
