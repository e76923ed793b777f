"""What an evaluation says at its end: the table and evaluation.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig
from rich.table import Table

from evaluation.estimate import MOST_DRAWS, Bound
from evaluation.profile import StepMoments, rate_and_distortion
from evaluation.saved import SavedRun
from lightning_modules import LikelihoodModule
from losses.elbo import nats_to_bits_per_dim
from runs.build import plain
from runs.directory import as_json, first_free, one_writer, whole, write_picture
from runs.report import CONSISTENCY, COSTS, TITLES, error, versions

KEPT_STEPS = 100  # at most, spread over ln t


def bound_record(bound: Bound, model: LikelihoodModule) -> dict[str, Any]:
    """Returns the bound as plain values: every term as a cost, with its errors, and how it was estimated."""
    scale = nats_to_bits_per_dim(1.0, model.num_dims)
    terms = {}
    for name, sign in COSTS.items():
        value = bound.terms[name]
        terms[name] = {"nats": {**value.as_dict(), "mean": sign * value.mean}}
        if model.levels is not None:
            terms[name]["bits_per_dim"] = {**value.as_dict(scale), "mean": sign * value.mean * scale}
    headline = {}
    if model.levels is not None:
        bits = terms["elbo"]["bits_per_dim"]
        headline = {"bpd": bits["mean"], **{f"bpd_{key}": bits[key] for key in ("se", "se_images", "se_noise")}}
    steps = {} if bound.moments is None else {"steps": steps_record(bound.moments, model)}
    return {
        **headline,
        "terms": terms,
        "num_images": len(bound.order),
        "estimator": bound.prepared.description,
        "consistency": bound.prepared.consistency,
        "replicates": bound.replicates,
        "network_calls_per_image": bound.replicates * bound.prepared.calls,
        "pilot_network_calls": bound.pilot_calls,
        **steps,
    }


def steps_record(moments: StepMoments, model: LikelihoodModule) -> dict[str, Any]:
    """Returns the measured steps of a DDPM as plain lists: KL, and for pixels the rate and distortion along the chain."""
    kept = sorted({round(2 * (model.num_steps / 2) ** (i / (KEPT_STEPS - 1))) for i in range(KEPT_STEPS)})
    index = [min(t, model.num_steps) - 2 for t in kept]
    record: dict[str, Any] = {"t": [i + 2 for i in index], "kl_nats": moments.means[index].tolist()}
    if model.levels is not None:
        rate, distortion = rate_and_distortion(moments, model.num_dims, model.levels)
        record |= {"rate_bits_per_dim": rate[index].tolist(), "rmse_levels": distortion[index].tolist()}
    return record


def bound_table(bound: Bound, model: LikelihoodModule, title: str) -> Table:
    """Returns the table of the terms with their errors: over images, and of the estimate's noise."""
    state = f"interrupted: {len(bound.order)} images so far; " if bound.interrupted else ""
    missed = ""
    if bound.enough is not None:
        wanted = f"replicates={bound.enough}" if bound.enough <= MOST_DRAWS else f"more than {MOST_DRAWS:,} replicates"
        missed = f"; for the wished precision of the noise: {wanted}"
    apart = bound.replicates > 1
    number = f"{bound.replicates} replicates of {len(bound.order)}" if apart else f"one estimate of each of {len(bound.order)}"
    errors = "s: of other images (images), of another seed (noise)" if apart else " of both: replicates=2 tells them apart"
    table = Table(
        title=title,
        title_justify="left",
        caption=f"{state}{bound.prepared.description}; {number} images; ± standard error{errors}{missed}",
        caption_justify="left",
    )
    unit = "nats/image" if model.levels is not None else "nats (log-density)"
    scaled = model.levels is not None
    scale = nats_to_bits_per_dim(1.0, model.num_dims) if scaled else 1.0
    headings = ["term of −ELBO", unit, *(["bits/dim"] if scaled else [])]
    headings += ["± images", "± noise"] if apart else ["± images and noise"]
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    titles = CONSISTENCY if bound.prepared.consistency else TITLES
    for name, sign in COSTS.items():
        value = bound.terms[name]
        if name == "elbo":
            table.add_section()
        cells = [f"{sign * value.mean:.3f}", *([f"{sign * value.mean * scale:.4f}"] if scaled else [])]
        cells += [error(part * scale, 4) for part in ((value.se_images, value.se_noise) if apart else (value.se,))]
        table.add_row(titles[name], *cells, style="bold" if name == "elbo" else None)
    return table


def evaluation_record(
    cfg: DictConfig,
    saved: SavedRun,
    datamodule: LightningDataModule,
    results: dict[str, Any],
    fabric: Fabric,
    interrupted: bool,
    seconds: float,
) -> dict[str, Any]:
    """Returns what evaluation.json holds: results by set of weights, and all that is needed to defend them."""
    first = next(iter(results.values()))
    return {
        **{key: value for key, value in first.items() if key.startswith("bpd")},
        "weights": list(results),
        "results": results,
        "interrupted": interrupted,
        "checkpoint": str(saved.path),
        "step": saved.content.get("global_step"),
        "split": cfg.split,
        "data": datamodule.protocol(),
        "model": saved.content["config"]["model"],
        "settings": plain(cfg),
        "seed": cfg.seed,
        "devices": fabric.world_size,
        "precision": str(cfg.fabric.precision),
        "seconds": round(seconds, 2),
        "versions": versions(),
    }


def write_new(directory: Path, record: dict[str, Any], pictures: dict[str, Any]) -> Path:
    """Writes evaluation.json and the pictures; an earlier evaluation is kept, under the next free number.

    Returns:
        the path of evaluation.json.
    """
    target, plots = directory / "evaluation.json", directory / "plots" / "evaluation"

    def kept(number: int) -> tuple[Path, Path]:
        return directory / f"evaluation-{number}.json", plots.with_name(f"evaluation-{number}")

    with one_writer(directory):
        with whole(target) as draft:
            draft.write_text(as_json(record))  # before the earlier one is kept: there may be no room for it
            earlier, its_plots = kept(first_free(lambda number: any(path.exists() for path in kept(number))))
            if target.exists():  # which stays until the new one takes its place: however this ends, there is one
                with whole(earlier) as copy:
                    copy.write_bytes(target.read_bytes())
            if plots.exists():
                plots.rename(its_plots)
        for name, picture in pictures.items():
            plots.mkdir(parents=True, exist_ok=True)
            write_picture(plots / f"{name}.png", picture)
    return target
