"""Estimators of the bound: all unbiased for the same number, at very different cost.

An estimator is prepared once, on a few pilot draws, and then maps images to one estimate each. Pilot draws share no noise
with the evaluation, so whatever is chosen by them leaves it unbiased.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from diffusion.step_profile import proposal_from, uniform_proposal
from evaluation.profile import StepMoments
from evaluation.rows import LEAST_REPLICATES
from lightning_modules import DDPMLightningModule, LikelihoodModule
from lightning_modules.ddpm import check_calls
from losses import Elbo

MEASURED_SHARE = 0.03  # of the proposal: its profile is measured, not learned on the way, so it needs little insurance
PILOT_CALLS = 9  # for each image, to learn how the noise of t = 1 compares with that of the steps above
MOST_CALLS = 65


@dataclass(frozen=True)
class Prepared:
    """An estimator made ready for one model.

    Attributes:
        estimate: images (b, C, H, W) -> one estimate each.
        calls: network calls that this takes for each image.
        description: what it does, for evaluation.json.
        consistency: as :class:`LikelihoodModule` has it, of this estimator.
    """

    estimate: Callable[[Tensor], Elbo]
    calls: int
    description: str
    consistency: bool = False


class Pilot(Protocol):
    """A few images to try an estimate on, with noise that the evaluation does not share.

    Attributes:
        wished_variance: of one image's mean over its replicates, nats²: what the wished precision allows.
    """

    wished_variance: float

    def terms(self, estimate: Callable[[Tensor], Elbo], calls: int) -> Tensor:
        """Returns the terms of an estimate that takes ``calls`` network calls: (n, 2, 3), nats."""


class Estimator(ABC):
    """One way of estimating the bound.

    Attributes:
        name: as in conf/evaluation.
    """

    name: str

    def check(self, model: LikelihoodModule) -> None:
        """Refuses a model that this estimator is not for.

        Raises:
            ValueError: in one sentence.
        """
        if not isinstance(model, DDPMLightningModule):
            raise ValueError(
                f"evaluation={self.name} is an estimator for DDPM, but this run is a {type(model).__name__}: "
                "leave evaluation=default"
            )

    @abstractmethod
    def prepare(self, model: LikelihoodModule, moments: StepMoments | None, pilot: Pilot) -> Prepared:
        """Makes it ready; ``moments`` are the measured steps of a DDPM of more than one step."""


class Full(Estimator):
    """Every t, with one noise draw for each; several t of one image share a network batch."""

    name = "full"

    def prepare(self, model: LikelihoodModule, moments: StepMoments | None, pilot: Pilot) -> Prepared:
        """See :meth:`Estimator.prepare`."""
        return Prepared(model.elbo, model.num_steps, f"every step of {model.num_steps}, one noise draw each")


def _drawn(calls: int) -> str:
    return f"t = 1, and {calls - 1} step{'s' * (calls > 2)} an image drawn"


@dataclass(frozen=True)
class Stratified(Estimator):
    """t = 1, and t drawn evenly from 2..T with low discrepancy over an image's draws and over a group of images.

    Args:
        calls: K, network calls for each image and replicate.
    """

    calls: int = 50
    name = "stratified"

    def __post_init__(self) -> None:
        check_calls(f"evaluation.calls={self.calls!r} with evaluation={self.name}", self.calls)

    def prepare(self, model: LikelihoodModule, moments: StepMoments | None, pilot: Pilot) -> Prepared:
        """See :meth:`Estimator.prepare`."""
        if self.calls >= model.num_steps:
            return Full().prepare(model, moments, pilot)
        proposal = uniform_proposal(model.num_steps).to(model.device)
        description = f"{_drawn(self.calls)} evenly with low discrepancy"
        return Prepared(lambda x: model.elbo(x, self.calls, proposal), self.calls, description)


@dataclass(frozen=True)
class Importance(Estimator):
    """t = 1, and t drawn by importance with low discrepancy and weights 1/p_t; less control variates.

    p_t ∝ √E[r_t²], measured on a few images: r_t is KL_t, or what the control of :mod:`diffusion.control` leaves of it.

    Args:
        calls: K, network calls for each image and replicate; ``None`` chooses by the wished precision.
        control: whether the control variates are used.
    """

    calls: int | None = None
    control: bool = True
    name = "importance"

    def __post_init__(self) -> None:
        if self.calls is not None:
            check_calls(f"evaluation.calls={self.calls!r} with evaluation={self.name}", self.calls)

    def prepare(self, model: LikelihoodModule, moments: StepMoments | None, pilot: Pilot) -> Prepared:
        """See :meth:`Estimator.prepare`."""
        if moments is None or (self.calls or 2) >= model.num_steps:
            return Full().prepare(model, moments, pilot)
        control = moments.control if self.control else None
        root_mean_squares = moments.root_mean_squares if control is None else moments.residuals
        proposal = proposal_from(root_mean_squares, MEASURED_SHARE).to(model.device)
        calls = self.calls or self._enough_calls(
            pilot, lambda k: lambda x: model.elbo(x, k, proposal, control), model.num_steps
        )
        if calls >= model.num_steps:
            return Full().prepare(model, moments, pilot)
        how = "" if control is None else " and control variates"
        description = f"{_drawn(calls)} by importance with low discrepancy{how}, unbiased"
        return Prepared(lambda x: model.elbo(x, calls, proposal, control), calls, description)

    @staticmethod
    def _enough_calls(pilot: Pilot, estimate: Callable[[int], Callable[[Tensor], Elbo]], num_steps: int) -> int:
        """Returns the K with which two replicates are precise enough, as far as more steps and not more t = 1 help.

        Beyond K - 1 = √(v_s/v_1), v_1 the noise of t = 1 and v_s that of one step drawn, another replicate is the cheaper one.
        """
        calls = min(PILOT_CALLS, num_steps - 1)
        terms = pilot.terms(estimate(calls), calls)
        first, _, steps = terms.var(1).mean(0).tolist()
        steps *= calls - 1
        best = math.sqrt(steps / first) if first > 0 else MOST_CALLS
        left = LEAST_REPLICATES * pilot.wished_variance - first
        enough = steps / left if left > 0 else MOST_CALLS
        return 1 + min(max(math.ceil(min(best, enough)), 1), MOST_CALLS - 1)


class ThreeVariable(Estimator):
    """The consistency form: log ratios along one jointly drawn chain."""

    name = "three_variable"

    def prepare(self, model: LikelihoodModule, moments: StepMoments | None, pilot: Pilot) -> Prepared:
        """See :meth:`Estimator.prepare`."""
        description = "three-variable (consistency) form: log ratios along one drawn chain, in place of KLs"
        return Prepared(model.three_variable_elbo, model.num_steps, description, consistency=True)


class Draws(Estimator):
    """One draw of the latents: the estimator of VAE and MHVAE."""

    name = "draws"

    def check(self, model: LikelihoodModule) -> None:
        """Every model has it."""

    def prepare(self, model: LikelihoodModule, moments: StepMoments | None, pilot: Pilot) -> Prepared:
        """See :meth:`Estimator.prepare`."""
        return Prepared(model.elbo, 1, model.protocol()["estimator"], model.consistency)


class Default(Estimator):
    """Importance for DDPM, draws of the latents for VAE and MHVAE."""

    name = "default"

    def check(self, model: LikelihoodModule) -> None:
        """Suits every model."""

    def prepare(self, model: LikelihoodModule, moments: StepMoments | None, pilot: Pilot) -> Prepared:
        """See :meth:`Estimator.prepare`."""
        own = Importance() if isinstance(model, DDPMLightningModule) else Draws()
        return own.prepare(model, moments, pilot)
