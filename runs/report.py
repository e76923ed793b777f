"""What a run says of itself: result.json, the printed table, and the facts that W&B groups by."""

from __future__ import annotations

import math
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Trainer
from rich.table import Table

from callbacks import Vitals
from lightning_modules import LikelihoodModule
from losses.elbo import SIGNS, nats_to_bits_per_dim

PACKAGES = ("torch", "lightning", "hydra-core", "torchmetrics", "torchvision")
TITLES = {
    "reconstruction": "reconstruction  −E ln p(x|z₁)",
    "prior": "prior  KL of z_T",
    "matching": "matching  ΣKL of z₁..z_{T−1}",
    "elbo": "total  −ELBO",
}
CONSISTENCY = TITLES | {"prior": "prior  KL of z_T from z_{T−1}", "matching": "matching  Σ ln q/p, z₁..z_{T−1}"}

COSTS = {term: -SIGNS.get(term, 1) for term in TITLES}  # the sign of each term as a cost, summing to -ELBO


def costs(metrics: dict[str, float], num_dims: int, levels: int | None) -> dict[str, dict[str, float]]:
    """Returns each term as a cost: {term: {nats, nats_se, bits_per_dim, bits_per_dim_se}}, summing to the total -ELBO.

    Continuous data has no bits/dim: its figures are log-densities.
    """
    rows = {}
    for term, sign in COSTS.items():
        row = {"nats": sign * metrics[f"test/{term}"] + 0.0, "nats_se": metrics[f"test/{term}_se"]}  # + 0.0: no -0
        if levels is not None:
            row |= {f"bits_per_dim{end}": nats_to_bits_per_dim(row[f"nats{end}"], num_dims) for end in ("", "_se")}
        rows[term] = row
    return rows


def table(metrics: dict[str, float], model: LikelihoodModule, title: str) -> Table:
    """Returns the table of the four terms, in nats and, for data with levels, in bits/dim, each with its standard error."""
    levels, titles = model.levels, CONSISTENCY if model.consistency else TITLES
    unit = "nats per image" if levels is not None else "nats (log-density)"
    error_bar = "at most one standard error (steps are drawn evenly over images)" if model.evens_out else "one standard error"
    table = Table(title=title, title_justify="left", caption=f"± {error_bar} over the test images", caption_justify="left")
    table.add_column("term of −ELBO")
    table.add_column(unit, justify="right")
    if levels is not None:
        table.add_column("bits/dim", justify="right")
    for term, row in costs(metrics, model.num_dims, levels).items():
        if term == "elbo":
            table.add_section()
        cells = [f"{row['nats']:.3f} ± {error(row['nats_se'], 3)}"]
        if levels is not None:
            cells.append(f"{row['bits_per_dim']:.4f} ± {error(row['bits_per_dim_se'], 4)}")
        table.add_row(titles[term], *cells, style="bold" if term == "elbo" else None)
    return table


def error(value: float, digits: int) -> str:
    """Returns a standard error as it is printed; one that is not known, as of one image, is a question mark."""
    return "?" if math.isnan(value) else f"{value:.{digits}f}"


def result_record(metrics: dict[str, float], num_dims: int, levels: int | None, **facts: Any) -> dict[str, Any]:
    """Returns what result.json holds: the metrics, the costs, the facts given, and the versions."""
    return {"metrics": metrics, "costs": costs(metrics, num_dims, levels), **facts, "versions": versions()}


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that figures depend on."""
    return {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}


def facts_to_group_by(directory: Path) -> dict[str, Any]:
    """Returns flat columns for W&B: the chosen groups by their short names (schedule, weighting, ...), code version, place."""
    choices = HydraConfig.get().runtime.choices
    chosen = {
        key.split("/")[-1]: value for key, value in choices.items() if "/" in key and "@" not in key and "hydra" not in key
    }
    names = {f"{group}_name": choices[group] for group in ("model", "data") if group in choices}
    return {**chosen, **names, "run_directory": str(directory), **code_version()}


def code_version() -> dict[str, Any]:
    """Returns {git_sha, git_dirty} of the code that runs, or nothing where it is no git checkout."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {"git_sha": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def totals(trainer: Trainer, fitted: float, elapsed: float) -> dict[str, Any]:
    """Returns what the run has cost over all its sessions: images_seen, and seconds of fit ("train") and in all.

    Args:
        trainer: the run's.
        fitted: seconds of this session when fit was over.
        elapsed: seconds of this session.
    """
    vitals = next((callback for callback in trainer.callbacks if isinstance(callback, Vitals)), None)
    if vitals is None:  # then nothing is known of earlier sessions
        return {"seconds": {"train": round(fitted, 2), "total": round(elapsed, 2)}}
    total = vitals.seconds + elapsed - vitals.session_seconds
    return {
        "images_seen": vitals.images_seen,
        "seconds": {"train": round(vitals.seconds, 2), "total": round(total, 2)},
    }
