"""The bound of a model on a split, to a wished precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaluation.estimators import Estimator, Prepared, terms_of
from evaluation.profile import StepMoments, measure_steps
from evaluation.rows import gather
from evaluation.statistics import Figure, figure
from lightning_modules import DDPMLightningModule
from losses import Elbo
from losses.elbo import nats_to_bits_per_dim
from runs.build import SettingError

if TYPE_CHECKING:
    from evaluation.job import Setting

PROFILE_IMAGES = 16
PILOT_IMAGES = 32
MARGIN = 1.3  # the pilot's variance is an estimate itself
MOST_REPLICATES = 1000


@dataclass(frozen=True, eq=False)
class Bound:
    """Estimates of the bound, image by image.

    Attributes:
        terms: {reconstruction, prior, matching, elbo}: the mean and its errors, nats.
        values: the bound, (N, R) float64, nats.
        order: which images, (N,).
        prepared: the estimator.
        replicates: R independent estimates of each image.
        moments: the steps of a DDPM, measured on a few images, or ``None``.
        pilot_calls: network calls spent before the evaluation, over all images.
        interrupted: whether Ctrl-C cut it short: then N is what was finished.
    """

    terms: dict[str, Figure]
    values: Tensor
    order: Tensor
    prepared: Prepared
    replicates: int
    moments: StepMoments | None
    pilot_calls: int
    interrupted: bool


def estimate_bound(setting: Setting, estimator: Estimator) -> Bound:
    """Prepares the estimator, chooses the number of replicates and evaluates.

    Raises:
        SettingError: if Ctrl-C came before two images were finished.
    """
    cfg, model, fabric = setting.cfg, setting.model, setting.fabric
    spent = 0

    def pilot(estimate: Callable[[Tensor], Elbo], calls: int) -> Tensor:
        nonlocal spent
        rows = setting.rows(2, "pilot", PILOT_IMAGES)
        spent += len(rows) * calls
        return gather(rows, lambda x: terms_of(estimate(x)), 3, fabric, cfg.batch_size, lambda _: None)[0]

    moments = None
    if isinstance(model, DDPMLightningModule) and model.num_steps > 1:
        moments = measure_steps(model, setting.rows(1, "profile", PROFILE_IMAGES), fabric, cfg.batch_size)
        spent += moments.calls
    prepared = estimator.prepare(model, moments, pilot)
    replicates = cfg.replicates or 2
    if cfg.replicates is None and prepared.calls < getattr(model, "num_steps", 2):
        replicates = _replicates(pilot(prepared.estimate, prepared.calls), setting)
    rows = setting.rows(replicates, "bound")
    title = f"{cfg.split} set: {len(rows.order)} images x {replicates} replicates x {prepared.calls} network calls"
    with setting.progress(title, len(rows)) as done:
        terms, interrupted = gather(rows, lambda x: terms_of(prepared.estimate(x)), 3, fabric, cfg.batch_size, done)
    finished = ~terms.isnan().flatten(1).any(1) if interrupted else torch.ones(len(terms), dtype=torch.bool)
    if finished.sum() < 2:
        raise SettingError("interrupted before two images were finished: nothing to report")
    terms, groups, order = terms[finished], rows.groups[finished], rows.order[finished]
    values = terms @ torch.tensor([1.0, -1.0, -1.0], dtype=terms.dtype)
    figures = {name: figure(terms[..., i], groups) for i, name in enumerate(("reconstruction", "prior", "matching"))}
    figures["elbo"] = figure(values, groups)
    return Bound(figures, values, order, prepared, replicates, moments, spent, interrupted)


def _replicates(terms: Tensor, setting: Setting) -> int:
    """Returns how many estimates of each image give the wished standard error, by the pilot's: at least 2."""
    noise = (terms[..., 0] - terms[..., 1] - terms[..., 2]).var(1).mean().item()
    per_dim = nats_to_bits_per_dim(math.sqrt(noise), setting.model.num_dims)
    num = len(setting.rows(1, "bound").order)
    wished = math.ceil(MARGIN * per_dim**2 / (num * setting.cfg.precision**2))
    return min(max(2, wished), MOST_REPLICATES)
