"""What is worked out beside the bound when it is asked for: other bounds, the latents' balance, pictures."""

from __future__ import annotations

from typing import Any

import torch

from evaluation.balance import LatentBalance, measure_latents
from evaluation.estimate import Bound
from evaluation.flow import ProbabilityFlow
from evaluation.importance_weighted import importance_weighted
from evaluation.pictures import plot_images, plot_rate_distortion, plot_steps, plot_units
from evaluation.setting import Setting
from evaluation.statistics import Figure, figure
from lightning_modules import LatentModule, LikelihoodModule
from losses.draws import own_generators
from losses.elbo import nats_to_bits_per_dim

BALANCE_DRAWS = 8
SOLVED_AGAIN = 4  # images
LOW = 0.05  # nats that the importance-weighted bound misses: few of its draws then carry the sum


def extras(setting: Setting, bound: Bound, records: dict[str, Any]) -> dict[str, Any]:
    """Works out what was asked for beside the bound, adding each to ``records`` when it is finished: {name: figure}."""
    cfg, model = setting.cfg, setting.model
    if cfg.iwae_samples:
        records["iwae"] = iwae_record(setting, bound)
    if cfg.probability_flow:
        add_flow(setting, records)
    latents: list[LatentBalance] = []
    if cfg.balance and isinstance(model, LatentModule):
        rows = setting.rows(BALANCE_DRAWS, "balance")
        with setting.progress("latents", len(rows)) as done:
            latents, aggregate = measure_latents(model, rows, setting.fabric, cfg.batch_size, done)
        records["balance"] = {"levels": [latent_record(latent) for latent in latents], **aggregate}
    return plots(setting, bound, latents) if cfg.pictures and setting.fabric.is_global_zero else {}


def plots(setting: Setting, bound: Bound, latents: list[LatentBalance]) -> dict[str, Any]:
    """Makes every picture that this model and data have: {name: figure}."""
    model, pictures = setting.model, {}
    if bound.moments is not None:
        pictures["kl_per_step"] = plot_steps(bound.moments, model.num_dims, model.unit)
        if model.levels is not None:
            pictures["rate_distortion"] = plot_rate_distortion(bound.moments, model.num_dims, model.levels)
    if latents:
        pictures["kl_per_unit"] = plot_units(latents, "ln q/p" if model.consistency else "KL")
    if model.levels is not None:
        bits = nats_to_bits_per_dim(-bound.values.mean(1), model.num_dims)
        pictures["bits_per_image"] = plot_images(bits, setting.images, bound.order, model.levels, setting.cfg.split)
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
        "gap_to_elbo": gap.as_dict(),
        "effective_samples": 1 / (1 / weighted.effective).mean().item(),  # how low the bound is goes by the reciprocals
    }


def add_flow(setting: Setting, records: dict[str, Any]) -> None:
    """Adds the probability flow's likelihood, of some dequantisations an image, and then what its solver may err."""
    cfg, model = setting.cfg, setting.model
    flow = ProbabilityFlow(model, cfg.flow_tolerance)
    rows = setting.rows(cfg.probability_flow, "flow")
    with setting.progress("probability flow", len(rows)) as done:
        values, _ = setting.gather(rows, lambda x: flow.log_likelihood(x).unsqueeze(1), 1, done)
    if lost := (~values.isfinite()).flatten(1).any(1).sum().item():
        records["probability_flow"] = {**flow.describe(), "images_not_solved": lost, "images": len(values)}
        return
    summary = figure(values[..., 0], torch.arange(len(rows.order)))
    evaluations = setting.fabric.all_reduce(torch.tensor(float(flow.evaluations)), reduce_op="sum")
    records["probability_flow"] = record = {
        **flow.describe(),
        "dequantisations": cfg.probability_flow,
        **in_units(summary, model),
        "evaluations": int(evaluations),
    }
    some = range(0, len(rows), rows.replicates)[:SOLVED_AGAIN]  # of images each
    finer = ProbabilityFlow(model, cfg.flow_tolerance / 10)
    with setting.progress("again, ten times as exact: some images", len(some)) as done:
        x, own = rows.batch(some)
        with torch.inference_mode(), setting.fabric.autocast(), own_generators(own):
            again = finer.log_likelihood(x.to(setting.fabric.device)).cpu()
        done(len(some))
    if not again.isfinite().all():
        return
    record |= {
        "solver_error_nats": (again - values[: len(some), 0, 0]).abs().mean().item(),
        "solver_error_images": len(some),
        "solver_error_evaluations": finer.evaluations,
    }


def latent_record(latent: LatentBalance) -> dict[str, Any]:
    """Returns one latent's balance as plain values, nats."""
    return {
        "kl": latent.kl.sum().item(),
        "active_units": latent.active,
        "units": len(latent.kl),
        "kl_per_unit": latent.kl.tolist(),
        "mean_variance_per_unit": latent.mean_variance.tolist(),
        "aggregate_mean_per_unit": latent.aggregate_mean.tolist(),
        "aggregate_variance_per_unit": latent.aggregate_variance.tolist(),
    }


def extra_lines(extra: dict[str, Any], model: LikelihoodModule) -> list[str]:
    """Returns a line for each thing that was worked out beside the bound."""

    def shown(record: dict[str, Any]) -> str:
        if model.levels is None:  # a cost, as in the table
            return f"{-record['nats']['mean']:.4f} ± {record['nats']['se']:.4f} nats (minus the log-density)"
        return f"{record['bits_per_dim']['mean']:.4f} ± {record['bits_per_dim']['se']:.4f} bits/dim"

    lines = []
    if iwae := extra.get("iwae"):
        gap, effective = iwae["gap_to_elbo"], iwae["effective_samples"]
        low = 0.5 * (1 / effective - 1 / iwae["samples"])  # nothing where all weights are equal, however few
        few = ": a few draws carry the sum, and ln p(x) may be far above" if low > LOW else ""
        lines.append(
            f"importance-weighted bound, K = {iwae['samples']}: {shown(iwae)}; {gap['mean']:.3f} ± {gap['se']:.3f} nats "
            f"above the ELBO; {effective:.1f} effective samples{few}"
        )
    flow = extra.get("probability_flow")
    if flow and "images_not_solved" in flow:
        lines.append(
            f"probability flow: no figure, its solver failed in batches with {flow['images_not_solved']} of {flow['images']} "
            "images; try another checkpoint or flow_tolerance="
        )
    elif flow:
        error = ", what its solver may err is not known"
        if "solver_error_nats" in flow:  # Ctrl-C may have come before it, or the finer solver failed
            moved = flow["solver_error_nats"]
            moved = moved if model.levels is None else nats_to_bits_per_dim(moved, model.num_dims)
            error = f", of which its solver may move {moved:.2g}"
        lines.append(f"probability flow: {shown(flow)}{error} — {flow['protocol']}")
    levels = extra.get("balance", {}).get("levels", [])
    for number, level in enumerate(levels, start=1):
        what = "ln q/p" if model.consistency and number < len(levels) else "KL"
        lines.append(f"z_{number}: {what} {level['kl']:.3f} nats, {level['active_units']} of {level['units']} units active")
    if "mutual_information" in extra.get("balance", {}):
        split = extra["balance"]
        lines.append(
            f"KL to the prior = {split['mutual_information']:.3f} nats of information about the image (at most ln N) + "
            f"{split['marginal_kl']:.3f} nats between the aggregate posterior and the prior"
        )
    return lines
