"""One evaluation: load a saved run -> estimate the bound -> what else was asked -> evaluation.json and a table."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from evaluation.balance import LevelBalance, measure_levels
from evaluation.estimate import Bound, estimate_bound
from evaluation.estimators import Estimator
from evaluation.flow import ProbabilityFlow
from evaluation.importance_weighted import importance_weighted
from evaluation.pictures import draw_images, draw_rate_distortion, draw_steps, draw_units
from evaluation.progress import progress
from evaluation.report import bound_record, bound_table, evaluation_record, write_new
from evaluation.rows import Rows, gather
from evaluation.saved import SavedRun
from evaluation.statistics import Figure, figure
from lightning_modules import DDPMLightningModule, LikelihoodModule
from losses.elbo import nats_to_bits_per_dim
from runs.build import SettingError, build_part
from runs.job import quiet_libraries

BALANCE_DRAWS = 8


@dataclass(frozen=True, eq=False)
class Setting:
    """What every part of an evaluation needs.

    Attributes:
        cfg: the evaluation's config.
        model: on its device, with the weights to evaluate.
        images: the split.
        fabric: devices and precision.
    """

    cfg: DictConfig
    model: LikelihoodModule
    images: Any
    fabric: Fabric

    def rows(self, replicates: int, purpose: str, num: int | None = None) -> Rows:
        """Returns rows of the evaluation's images, or of the first ``num`` of them."""
        limit = min(len(self.images), self.cfg.max_images or len(self.images), num or len(self.images))
        return Rows.of_split(self.images, limit, replicates, self.cfg.seed, purpose)

    def gather(
        self,
        rows: Rows,
        function: Callable[[Tensor], Tensor],
        width: int,
        done: Callable[[int], None] = lambda _: None,
        partial: bool = False,
    ) -> tuple[Tensor, bool]:
        """See :func:`evaluation.rows.gather`."""
        return gather(rows, function, width, self.fabric, self.cfg.batch_size, done, partial)

    def progress(self, title: str, total: int):
        """Shows progress on rank 0."""
        return progress(title, total, quiet=self.fabric.global_rank > 0)


def run(cfg: DictConfig) -> tuple[float, bool]:
    """Evaluates what ``cfg`` describes.

    Returns:
        (bits/dim, or -ELBO in nats for continuous data, of the first set of weights; whether Ctrl-C cut it short).

    Raises:
        SettingError: for a setting that cannot work, before anything is evaluated.
    """
    started = time.monotonic()
    quiet_libraries()
    check_settings(cfg)
    saved = SavedRun.open(str(cfg.run), list(cfg.packages))
    chosen = choose_weights(cfg.weights, saved)
    estimator = build_part(cfg.evaluation)
    model = saved.model()
    check_model(cfg, estimator, model)
    datamodule = saved.data(cfg.data_root)
    saved.load(model, chosen[0])
    fabric = build_fabric(cfg.fabric)
    fabric.launch()
    model = model.to(fabric.device).eval()
    results, pictures, interrupted = {}, {}, False
    for weights in chosen:
        saved.load(model, weights)
        setting = Setting(cfg, model, TestImages.of(datamodule, cfg.split), fabric)
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
        say(
            fabric,
            f"wrote {path}" + (f" and {len(pictures)} pictures in {path.parent / 'plots' / 'evaluation'}" if pictures else ""),
        )
    first = results[chosen[0]]
    return first.get("bpd", first["terms"]["elbo"]["nats"]["mean"]), interrupted


def say(fabric: Fabric, text: Any) -> None:
    """Prints on rank 0."""
    if fabric.is_global_zero:
        Console().print(text, markup=False, highlight=False, soft_wrap=isinstance(text, str))


def check_settings(cfg: DictConfig) -> None:
    """Refuses what cannot work, in one sentence."""
    if OmegaConf.is_missing(cfg, "run"):
        raise SettingError(
            "run= is missing: give a run directory or a checkpoint file, as in run=outputs/2026-01-31/12-00-00-ddpm-digits"
        )
    if cfg.split not in ("train", "val", "test"):
        raise SettingError(f"split={cfg.split} is unknown: choose train, val or test")
    if isinstance(cfg.precision, bool) or not isinstance(cfg.precision, (int, float)) or not cfg.precision > 0:
        raise SettingError(
            f"precision={cfg.precision} must be above 0: it is the wished standard error of the noise, in bits/dim"
        )
    least = {"batch_size": 1, "iwae_samples": 0, "probability_flow": 0, "seed": 0, "replicates": 1, "max_images": 2}
    for name, minimum in least.items():
        value = cfg[name]
        if value is None and name in ("replicates", "max_images"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise SettingError(f"{name}={value}: give an integer of at least {minimum}")


def check_model(cfg: DictConfig, estimator: Estimator, model: LikelihoodModule) -> None:
    """Refuses what this family of models does not have."""
    try:
        estimator.check(model)
    except ValueError as error:
        raise SettingError(str(error)) from None
    if cfg.probability_flow and not isinstance(model, DDPMLightningModule):
        raise SettingError(f"probability_flow={cfg.probability_flow} is for DDPM, but this run is a {type(model).__name__}")


def choose_weights(wished: str | None, saved: SavedRun) -> list[str]:
    """Returns the sets of weights to evaluate: by default what the run itself was tested with."""
    there = list(saved.weights)
    if wished == "both" and len(there) == 2:
        return there
    if wished not in (None, *there):
        raise SettingError(f"weights={wished}: this checkpoint has {' and '.join(there)} weights; choose one of them or both")
    return [wished or there[0]]


def build_fabric(cfg: DictConfig) -> Fabric:
    """Builds Fabric; devices and precisions that do not exist here are refused in one sentence."""
    if "true" in str(cfg.precision) and not str(cfg.precision).startswith(("32", "64")):
        raise SettingError(f"fabric.precision={cfg.precision} is not supported: choose bf16-mixed or 32-true")
    try:
        return Fabric(**OmegaConf.to_container(cfg, resolve=True))
    except Exception as error:
        raise SettingError(f"fabric: {' '.join(str(error).split())}") from error


class TestImages:
    """The images of one split, without the mirror images that training keeps behind its own."""

    __test__ = False

    def __init__(self, images: Any, num: int) -> None:
        self.images, self.num = images, num

    @classmethod
    def of(cls, datamodule: LightningDataModule, split: str) -> TestImages:
        """Returns the split's images."""
        return cls(datamodule.splits[split], datamodule.sizes[split])

    def __len__(self) -> int:
        return self.num

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Returns the images of ``index``."""
        return self.images.index_select(dim, index)


def extras(setting: Setting, bound: Bound, records: dict[str, Any]) -> dict[str, Any]:
    """Works out what was asked for beside the bound, adding each to ``records`` when it is finished: {name: figure}."""
    cfg, model = setting.cfg, setting.model
    if cfg.iwae_samples:
        records["iwae"] = iwae_record(setting, bound)
    if cfg.probability_flow:
        records["probability_flow"] = flow_record(setting)
    levels: list[LevelBalance] = []
    if cfg.balance and hasattr(model, "levels_of"):
        levels, aggregate = measure_levels(model, setting.rows(BALANCE_DRAWS, "balance"), setting.fabric, cfg.batch_size)
        records["balance"] = {"levels": [level_record(level) for level in levels], **aggregate}
    return draw(setting, bound, levels) if cfg.pictures and setting.fabric.is_global_zero else {}


def draw(setting: Setting, bound: Bound, levels: list[LevelBalance]) -> dict[str, Any]:
    """Draws every picture that this model and data have: {name: figure}."""
    model, pictures = setting.model, {}
    unit = "nats" if model.levels is None else "bits/dim"
    if bound.moments is not None:
        pictures["kl_per_step"] = draw_steps(bound.moments, model.num_dims, unit)
        if model.levels is not None:
            pictures["rate_distortion"] = draw_rate_distortion(bound.moments, model.num_dims, model.levels)
    if levels:
        pictures["kl_per_unit"] = draw_units(levels)
    if model.levels is not None:
        bits = nats_to_bits_per_dim(-bound.values.mean(1), model.num_dims)
        images = setting.images.index_select(0, bound.order)
        pictures["bits_per_image"] = draw_images(bits, images, model.levels, setting.cfg.split)
    return pictures


def in_units(value: Figure, model: LikelihoodModule) -> dict[str, Any]:
    """Returns a figure of ln p in nats, and as a cost in bits/dim where there are levels."""
    record: dict[str, Any] = {"nats": value.as_dict()}
    if model.levels is not None:
        scale = nats_to_bits_per_dim(1.0, model.num_dims)
        record["bits_per_dim"] = {**value.as_dict(scale), "mean": -value.mean * scale}
    return record


def iwae_record(setting: Setting, bound: Bound) -> dict[str, Any]:
    """Works out the importance-weighted bound and its gap to the ELBO."""
    cfg = setting.cfg
    rows = setting.rows(cfg.iwae_samples, "iwae")
    with setting.progress(f"importance-weighted bound, K = {cfg.iwae_samples}", len(rows)) as done:
        weighted = importance_weighted(setting.model, rows, setting.fabric, cfg.batch_size, done)
    one = torch.zeros(len(rows.order), dtype=torch.int64)
    gap = figure((weighted.bounds - bound.values.mean(1)).unsqueeze(1), one)
    return {
        "samples": cfg.iwae_samples,
        **in_units(figure(weighted.bounds.unsqueeze(1), one), setting.model),
        "gap_to_elbo": in_units(gap, setting.model)["nats"],
        "effective_samples": weighted.effective.mean().item(),
    }


def flow_record(setting: Setting) -> dict[str, Any]:
    """Works out the probability flow's likelihood, ``probability_flow`` dequantisations an image."""
    cfg, model = setting.cfg, setting.model
    flow = ProbabilityFlow(model)
    rows = setting.rows(cfg.probability_flow, "flow")
    with setting.progress("probability flow", len(rows)) as done:
        values, _ = setting.gather(rows, lambda x: flow.log_likelihood(x).unsqueeze(1), 1, done)
    summary = figure(values[..., 0], torch.arange(len(rows.order)))
    return {
        **flow.describe(),
        "dequantisations": cfg.probability_flow,
        **in_units(summary, model),
        "evaluations": flow.evaluations,
    }


def level_record(level: LevelBalance) -> dict[str, Any]:
    """Returns one level's balance as plain values, nats."""
    return {
        "kl": level.kl.sum().item(),
        "active_units": level.active,
        "units": len(level.kl),
        "kl_per_unit": level.kl.tolist(),
        "mean_variance_per_unit": level.mean_variance.tolist(),
        "aggregate_mean_per_unit": level.aggregate_mean.tolist(),
        "aggregate_variance_per_unit": level.aggregate_variance.tolist(),
    }


def extra_lines(extra: dict[str, Any], model: LikelihoodModule) -> list[str]:
    """Returns a line for each thing that was worked out beside the bound."""
    unit = "nats" if model.levels is None else "bits/dim"

    def shown(record: dict[str, Any]) -> str:
        value = record["nats" if model.levels is None else "bits_per_dim"]
        return f"{value['mean']:.4f} ± {value['se']:.4f} {unit}"

    lines = []
    if iwae := extra.get("iwae"):
        lines.append(
            f"importance-weighted bound, K = {iwae['samples']}: {shown(iwae)}; {iwae['gap_to_elbo']['mean']:.3f} nats above "
            f"the ELBO; {iwae['effective_samples']:.1f} effective samples"
        )
    if flow := extra.get("probability_flow"):
        lines.append(f"probability flow: {shown(flow)} — {flow['protocol']}")
    for number, level in enumerate(extra.get("balance", {}).get("levels", []), start=1):
        lines.append(f"z_{number}: KL {level['kl']:.3f} nats, {level['active_units']} of {level['units']} units active")
    if "mutual_information" in extra.get("balance", {}):
        split = extra["balance"]
        lines.append(
            f"KL to the prior = {split['mutual_information']:.3f} nats of information about the image (at most ln N) + "
            f"{split['marginal_kl']:.3f} nats between the aggregate posterior and the prior"
        )
    return lines
