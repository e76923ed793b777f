"""What a run says at its end: result.json and the printed table."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from rich.table import Table

from losses.elbo import nats_to_bits_per_dim

PACKAGES = ("torch", "lightning", "hydra-core", "torchmetrics", "torchvision")
TITLES = {
    "reconstruction": "reconstruction  −E ln p(x|z₁)",
    "prior": "prior  KL of z_T",
    "matching": "matching  ΣKL of z₁..z_{T−1}",
    "elbo": "total  −ELBO",
}


def costs(metrics: dict[str, float], num_dims: int, levels: int | None) -> dict[str, dict[str, float]]:
    """Returns each term as a cost: {term: {nats, nats_se, bits_per_dim, bits_per_dim_se}}, summing to the total -ELBO.

    Continuous data has no bits/dim: its figures are log-densities.
    """
    rows = {}
    for term in TITLES:
        sign = 1 if term in ("prior", "matching") else -1
        row = {"nats": sign * metrics[f"test/{term}"], "nats_se": metrics[f"test/{term}_se"]}
        if levels is not None:
            row |= {f"bits_per_dim{end}": nats_to_bits_per_dim(row[f"nats{end}"], num_dims) for end in ("", "_se")}
        rows[term] = row
    return rows


def table(metrics: dict[str, float], num_dims: int, levels: int | None, title: str) -> Table:
    """Returns the table of the four terms, in nats and, for data with levels, in bits/dim, each with its standard error."""
    unit = "nats per image" if levels is not None else "nats (log-density)"
    table = Table(
        title=title, title_justify="left", caption="± one standard error over the test images", caption_justify="left"
    )
    table.add_column("term of −ELBO")
    table.add_column(unit, justify="right")
    if levels is not None:
        table.add_column("bits/dim", justify="right")
    for term, row in costs(metrics, num_dims, levels).items():
        if term == "elbo":
            table.add_section()
        cells = [f"{row['nats']:.3f} ± {row['nats_se']:.3f}"]
        if levels is not None:
            cells.append(f"{row['bits_per_dim']:.4f} ± {row['bits_per_dim_se']:.4f}")
        table.add_row(TITLES[term], *cells, style="bold" if term == "elbo" else None)
    return table


def result_record(metrics: dict[str, float], num_dims: int, levels: int | None, **facts: Any) -> dict[str, Any]:
    """Returns what result.json holds: the metrics, the costs, the facts given, and the versions."""
    return {"metrics": metrics, "costs": costs(metrics, num_dims, levels), **facts, "versions": versions()}


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that figures depend on."""
    return {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
