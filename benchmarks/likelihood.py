"""What one figure of a DDPM costs by each estimator: ``python -m benchmarks.likelihood [--run RUN]`` writes its page.

The yardstick is the loop of improved-diffusion's ``calc_bpd_loop``: all T steps of every image, one at a time, with one noise
draw each. Its Monte-Carlo noise, and every estimator's, is read off independent replicates of the same images; then variance
times network calls, and how many calls and seconds an image each needs for the noise that the loop has. All in one run.
"""

from __future__ import annotations

import argparse
import statistics
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import Tensor

from benchmarks.record import add_out, write_page
from benchmarks.small_models import digits, trained_digits
from diffusion import Epsilon, linear, log_snr_linear
from diffusion.control import level_counts
from diffusion.step_profile import proposal_from, uniform_proposal
from evaluation.estimators import MEASURED_SHARE
from evaluation.profile import measure_steps
from evaluation.rows import Rows, gather
from evaluation.saved import SavedRun
from evaluation.statistics import figure
from lightning_modules import DDPMLightningModule
from losses.elbo import nats_to_bits_per_dim

CALLS = 17  # of the importance estimators


@dataclass(frozen=True)
class Cost:
    """One estimator: K calls an image, its noise for one image in bits/dim, and seconds an image."""

    name: str
    calls: int
    mean: float
    deviation: float
    seconds: float


@dataclass(frozen=True)
class Preparation:
    """What importance takes once to know where the noise is: network calls and seconds; and how many images there are."""

    calls: int
    seconds: float
    images: int

    def __str__(self) -> str:
        """What stands below a table."""
        return (
            f"Not in the table: what importance takes once, however many images there are, to know where the noise is: "
            f"{self.calls:,} network calls, {self.calls / self.images:.3g} for each of these {self.images} images, and "
            f"{self.seconds:.2g} s."
        )


def loop(model: DDPMLightningModule, x: Tensor) -> Tensor:
    """Returns the ELBO by a plain loop over t = T..1, one network batch for each: (B, C, H, W) -> (B,), nats."""
    x0, total = model.to_unit(x), torch.zeros(len(x))
    for step in range(model.num_steps, 1, -1):
        total = total + model.step_draws(x0, torch.full((len(x), 1), step)).kl[:, 0]
    return -model.first_draws(x, x0)[0] - model.process.prior_kl(x0) - total


def measure(
    name: str,
    estimate: Callable[[Tensor], Tensor],
    calls: int,
    images: Tensor,
    replicates: int,
    model: DDPMLightningModule,
    fabric: Fabric,
) -> Cost:
    """Reads the noise off ``replicates`` of each image, and the time off the median of nine passes over all images."""
    rows = Rows.of_split(images, len(images), replicates, 0, name)
    values, _ = gather(rows, lambda x: estimate(x).unsqueeze(1), 1, fabric, len(images), lambda _: None)
    noise = figure(values[..., 0], rows.groups)
    # for one replicate of one image, what low discrepancy within a group takes away included
    deviation = nats_to_bits_per_dim(noise.se_noise * (replicates * len(images)) ** 0.5, model.num_dims)
    seconds = []
    for _ in range(9):
        with torch.inference_mode():
            start = time.perf_counter()
            estimate(images)
            seconds.append((time.perf_counter() - start) / len(images))
    return Cost(name, calls, nats_to_bits_per_dim(-noise.mean, model.num_dims), deviation, statistics.median(seconds))


def study(model: DDPMLightningModule, images: Tensor, replicates: int) -> tuple[list[Cost], Preparation]:
    """Measures every estimator on the same images, the loop first; and what importance takes before it begins."""
    fabric = Fabric(accelerator="cpu", devices=1)
    start = time.perf_counter()
    counts = level_counts(images, model.levels)
    moments = measure_steps(model, Rows.of_split(images, 32, 1, 0, "profile"), counts, fabric, 256)
    moments.control.totals(images[:1])
    before = Preparation(moments.calls, time.perf_counter() - start, len(images))
    plain = proposal_from(moments.root_mean_squares, MEASURED_SHARE)
    controlled = proposal_from(moments.residuals, MEASURED_SHARE)
    even = uniform_proposal(model.num_steps)

    def drawn(calls: int, proposal: Tensor, control: object = None) -> tuple[Callable[[Tensor], Tensor], int]:
        return lambda x: model.elbo(x, calls, proposal, control).value, calls

    estimates = {
        "loop over all t, as calc_bpd_loop": (partial(loop, model), model.num_steps),
        "one uniform t": drawn(2, even),
        "stratified, 50 calls": drawn(50, even),
        f"importance without control variates, {CALLS} calls": drawn(CALLS, plain),
        f"importance, {CALLS} calls": drawn(CALLS, controlled, moments.control),
    }
    costs = []
    for name, (estimate, calls) in estimates.items():
        many = replicates if calls == model.num_steps else 8 * replicates
        costs.append(measure(name, estimate, calls, images, many, model, fabric))
        print(f"  {name}: {costs[-1].deviation:.4f} bits/dim of noise an image", flush=True)
    return costs, before


def table(costs: list[Cost]) -> list[str]:
    """Returns the lines of a Markdown table; ratios are against the first row."""
    first = costs[0]
    lines = [
        "| estimator | calls | mean bits/dim | noise of one image (sd) | variance x calls | calls for the loop's noise "
        "| times fewer | seconds an image for it | times faster |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cost in costs:
        repeats = (cost.deviation / first.deviation) ** 2
        needed, seconds = repeats * cost.calls, repeats * cost.seconds
        lines.append(
            f"| {cost.name} | {cost.calls} | {cost.mean:.4f} | {cost.deviation:.4f} | {cost.deviation**2 * cost.calls:.3g} | "
            f"{needed:,.0f} | {first.calls / needed:.3g} | {seconds:.3g} | {first.seconds / seconds:.3g} |"
        )
    return lines


def main() -> None:
    """Measures, prints the tables and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="a trained DDPM of digits; by default two small ones are trained here")
    parser.add_argument("--steps", type=int, default=1500, help="optimiser steps of the small ones")
    parser.add_argument("--replicates", type=int, default=4, help="of the loop; the others have eight times as many")
    add_out(parser)
    settings = parser.parse_args()
    splits = digits()
    if settings.run:
        models = {f"the run {Path(settings.run).name}": SavedRun.open(settings.run).trained()}
    else:
        trained = partial(trained_digits, 1000, splits["train"], steps=settings.steps)
        models = {
            "lattice prediction, log_snr_linear, T = 1000": trained(log_snr_linear),
            "noise prediction, linear schedule, T = 1000": trained(linear, Epsilon()),
        }
    text = [
        "# What a DDPM's bits/dim costs",
        "",
        "Written by `python -m benchmarks.likelihood`: digits' test images, a small MLP on a CPU; times are medians and only",
        "their ratios mean anything, to a factor of two: calls of so small a network feel all else that the machine does. All",
        "estimators are unbiased for one number. *Calls for the loop's noise*: network calls an image after which the",
        "Monte-Carlo standard error is the loop's.",
    ]
    figures = {"replicates": settings.replicates, "steps": None if settings.run else settings.steps, "models": {}}
    for name, model in models.items():
        print(name, flush=True)
        costs, before = study(model, splits["test"], settings.replicates)
        text += ["", f"## {name}", "", *table(costs), "", *textwrap.wrap(str(before), 120)]
        figures["models"][name] = {"estimators": [asdict(cost) for cost in costs], "preparation": asdict(before)}
    write_page("likelihood", settings.out, "\n".join([*text, ""]), figures)
    print("\n".join(text))


if __name__ == "__main__":
    main()
