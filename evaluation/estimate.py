"""The bound of a model on a split, to a wished precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from evaluation.estimators import MOST_CALLS, Estimator, Prepared
from evaluation.profile import StepMoments, measure_steps
from evaluation.rows import LEAST_REPLICATES
from evaluation.setting import Setting
from evaluation.statistics import Figure, figure
from lightning_modules import DDPMLightningModule
from losses import Elbo
from losses.elbo import SIGNS, nats_to_bits_per_dim
from runs.build import SettingError

PROFILE_IMAGES = 32
PILOT_IMAGES = 32
MARGIN = 1.3  # the pilot's variance is an estimate itself
MOST_REPLICATES = 1000
MOST_DRAWS = 10**6  # of one image, where they are asked for


@dataclass(frozen=True, eq=False)
class Bound:
    """Estimates of the bound, image by image.

    Attributes:
        terms: {reconstruction, prior, matching, elbo}: the mean and its errors, nats.
        values: the bound, (N, R) float64, nats.
        order: which images, (N,).
        prepared: the estimator.
        replicates: R independent estimates of each image.
        enough: R that would have given the wished precision, if it was missed and R not set.
        moments: the steps of a DDPM, measured on a few images, or ``None``.
        pilot_calls: network calls spent before the evaluation, over all images.
        interrupted: whether Ctrl-C cut it short: then N and R are what was finished.
    """

    terms: dict[str, Figure]
    values: Tensor
    order: Tensor
    prepared: Prepared
    replicates: int
    enough: int | None
    moments: StepMoments | None
    pilot_calls: int
    interrupted: bool


class Trial:
    """The pilot of one evaluation: see :class:`evaluation.estimators.Pilot`. It counts what it spends."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.calls = setting, 0
        nats = setting.cfg.precision / nats_to_bits_per_dim(1.0, setting.model.num_dims)
        self.wished_variance = len(setting.rows(1, "bound").order) * nats**2 / MARGIN

    def terms(self, estimate: Callable[[Tensor], Elbo], calls: int) -> Tensor:
        """Returns the terms on the pilot's rows: (n, 2, 3), nats."""
        rows = self.setting.rows(2, "pilot", PILOT_IMAGES)
        self.calls += len(rows) * calls
        terms = self.setting.gather(rows, lambda x: estimate(x).terms().T, 3)[0]
        _refuse_infinite(_bounds(terms), "a pilot")
        return terms

    def replicates(self, prepared: Prepared) -> int:
        """Returns how many estimates of each image give the wished precision: at least 2."""
        terms = self.terms(prepared.estimate, prepared.calls)
        variance = _bounds(terms).var(1).mean().item()
        return min(max(LEAST_REPLICATES, math.ceil(variance / self.wished_variance)), MOST_REPLICATES)


def _bounds(terms: Tensor) -> Tensor:
    """The bound from its terms: (N, R, 3) -> (N, R)."""
    return terms @ torch.tensor([*SIGNS.values()], dtype=terms.dtype)


def _refuse_infinite(values: Tensor, by: str) -> None:
    if not values.isfinite().all():
        raise SettingError(
            f"the bound is {values.mean()}: {(~values.isfinite()).any(1).sum()} of {len(values)} images have no finite "
            f"estimate by {by}; try another evaluation=, or another checkpoint"
        )


def estimate_bound(setting: Setting, estimator: Estimator) -> Bound:
    """Prepares the estimator, chooses the number of replicates and evaluates.

    Raises:
        SettingError: if there are not two images, Ctrl-C came before two were finished, or the estimate is not finite.
    """
    cfg, model = setting.cfg, setting.model
    if len(setting.images) < 2:
        raise SettingError(f"split={cfg.split} holds {len(setting.images)} image: an estimate with an error bar needs two")
    trial = Trial(setting)
    moments = None
    if isinstance(model, DDPMLightningModule) and model.num_steps > 1:
        num = len(setting.rows(1, "profile", PROFILE_IMAGES).order)
        rows = setting.rows(math.ceil(PROFILE_IMAGES / num), "profile", PROFILE_IMAGES)
        moments = measure_steps(model, rows, setting.level_counts(), setting.fabric, cfg.batch_size)
        trial.calls += moments.calls
        if not moments.means.isfinite().all():
            t = 2 + int((~moments.means.isfinite()).nonzero()[0])
            raise SettingError(f"the bound is not finite: KL_t is {moments.means[t - 2]} near t={t}; try another checkpoint")
    prepared = estimator.prepare(model, moments, trial)
    replicates = cfg.replicates or LEAST_REPLICATES
    if cfg.replicates is None and prepared.calls <= MOST_CALLS:  # a pilot of hundreds of steps would cost too much
        replicates = trial.replicates(prepared)
    rows = setting.rows(replicates, "bound")
    title = f"{cfg.split} set: {len(rows.order)} images x {replicates} replicates x {prepared.calls} network calls"
    with setting.progress(title, len(rows)) as done:
        terms, finished = setting.gather(rows, lambda x: prepared.estimate(x).terms().T, 3, done, partial=True)
    groups, order = rows.groups, rows.order
    if finished is not None:
        if finished.sum() < 2:
            raise SettingError("interrupted before two images were finished: nothing to report")
        terms, groups, order, replicates = terms[finished], groups[finished], order[finished], terms.shape[1]
    values = _bounds(terms)
    figures = {name: figure(terms[..., i], groups) for i, name in enumerate(SIGNS)}
    figures["elbo"] = figure(values, groups)
    _refuse_infinite(values, prepared.description)
    over = nats_to_bits_per_dim(figures["elbo"].se_noise, model.num_dims) / cfg.precision
    enough = math.ceil(replicates * over**2) if cfg.replicates is None and over > 1 else None
    return Bound(figures, values, order, prepared, replicates, enough, moments, trial.calls, finished is not None)
