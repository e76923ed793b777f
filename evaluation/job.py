"""One evaluation: load a saved run -> estimate the bound -> what else was asked -> evaluation.json and a table."""

from __future__ import annotations

import time
from typing import Any

from omegaconf import DictConfig

from evaluation.begin import build_fabric, check_groups, check_kinds, open_run, place, say
from evaluation.estimate import MOST_DRAWS, estimate_bound
from evaluation.estimators import Estimator
from evaluation.extras import extra_lines, extras
from evaluation.report import bound_record, bound_table, evaluation_record, write_new
from evaluation.setting import Setting, SplitImages
from lightning_modules import DDPMLightningModule, LikelihoodModule
from runs.build import SettingError, build_part
from runs.names import check_names
from runs.speech import quiet_libraries

FINEST = 1e-8  # tolerance of the flow's solver: a network in float32 is not smooth enough for less


def run(cfg: DictConfig) -> tuple[float, bool]:
    """Evaluates what ``cfg`` describes.

    Returns:
        (bits/dim, or -ELBO in nats for continuous data, of the first set of weights; whether Ctrl-C cut it short).

    Raises:
        SettingError: for a setting that cannot work, before anything is evaluated.
    """
    started = time.monotonic()
    quiet_libraries()
    check_names(cfg, "evaluate")
    check_settings(cfg)
    saved = open_run(cfg)
    chosen = saved.choose(cfg.weights)
    fabric = build_fabric(cfg.fabric, adds_up=True)
    estimator = build_part(cfg.evaluation)
    model = saved.model()
    check_model(cfg, estimator, model)
    datamodule = saved.data(cfg.data_root)
    saved.load(model, chosen[0])
    fabric.launch()
    model = place(model, fabric, cfg.fabric)
    results, pictures, interrupted = {}, {}, False
    for weights in chosen:
        saved.load(model, weights)
        setting = Setting(cfg, model, SplitImages.of(datamodule, cfg.split), fabric)
        try:
            bound = estimate_bound(setting, estimator)
        except KeyboardInterrupt:
            raise SettingError("interrupted before the evaluation proper had begun: nothing to report") from None
        interrupted = bound.interrupted
        results[weights] = bound_record(bound, model)
        say(fabric, bound_table(bound, model, f"{cfg.split} set, {weights} weights, step {saved.content.get('global_step')}"))
        if interrupted:
            break
        extra: dict[str, Any] = {}
        try:
            drawn = extras(setting, bound, extra)
            pictures |= drawn if weights == chosen[0] else {}
        except KeyboardInterrupt:
            interrupted = True
        results[weights] |= extra
        for line in extra_lines(extra, model):
            say(fabric, line)
        if interrupted:
            say(fabric, "interrupted: the rest of what was asked for is left out")
            break
    if fabric.is_global_zero:
        record = evaluation_record(cfg, saved, datamodule, results, fabric, interrupted, time.monotonic() - started)
        path = write_new(saved.directory, record, pictures)
        plots = f" and {len(pictures)} picture{'s' * (len(pictures) > 1)} in {path.parent / 'plots' / 'evaluation'}"
        say(fabric, f"wrote {path}{plots if pictures else ''}")
    first = results[chosen[0]]
    return first.get("bpd", first["terms"]["elbo"]["nats"]["mean"]), interrupted


def check_settings(cfg: DictConfig) -> None:
    """Refuses what cannot work, in one sentence."""
    check_groups(cfg, "evaluation", "fabric")
    if cfg.split not in ("train", "val", "test"):
        raise SettingError(f"split={cfg.split} is unknown: choose train, val or test")
    if isinstance(cfg.precision, bool) or not isinstance(cfg.precision, (int, float)) or not cfg.precision > 0:
        raise SettingError(
            f"precision={cfg.precision} must be above 0: it is the wished standard error of the noise, in bits/dim"
        )
    tolerance = cfg.flow_tolerance
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not FINEST <= tolerance <= 1:
        raise SettingError(f"flow_tolerance={tolerance}: give a number from {FINEST} to 1, the solver's error at each step")
    least = {"batch_size": 1, "iwae_samples": 0, "probability_flow": 0, "seed": 0, "replicates": 1, "max_images": 2}
    most = dict.fromkeys(("iwae_samples", "probability_flow", "replicates"), MOST_DRAWS)
    check_kinds(cfg, least, ("balance", "pictures"), optional=("replicates", "max_images"), most=most)


def check_model(cfg: DictConfig, estimator: Estimator, model: LikelihoodModule) -> None:
    """Refuses what this family of models does not have."""
    try:
        estimator.check(model)
    except ValueError as error:
        raise SettingError(str(error)) from None
    if cfg.probability_flow and not isinstance(model, DDPMLightningModule):
        raise SettingError(f"probability_flow={cfg.probability_flow} is for DDPM, but this run is a {type(model).__name__}")
