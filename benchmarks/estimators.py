"""The two forms of DDPM's ELBO as estimators: ``python -m benchmarks.estimators`` writes its page, its plot and its figures.

For a single random t, the two-variable (denoising) form and the three-variable (consistency) form have one mean and different
noise. Measured for the value and for its gradient, on linear-Gaussian data with a deliberately imperfect predictor, where the
mean is known in closed form, and on digits with a small trained network. And what the closed form that tutorials print instead
of the second one amounts to.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from benchmarks.record import add_out, write_page
from benchmarks.small_models import digits, linear_gaussian, linear_gaussian_elbo, trained_digits
from callbacks.pictures import BLUE, ORANGE
from diffusion import linear, log_snr_linear
from lightning_modules import DDPMLightningModule
from losses import DiagGaussian, kl

LENGTHS = (2, 5, 10, 50, 100, 1000)
S2, SCALE = 0.25, 0.8  # data N(0, 1/4); v̂ at 0.8 of the optimal one
GRADIENTS = 2000  # examples


@dataclass(frozen=True)
class Noise:
    """One estimator at one T: nats per example, of a single random t.

    Attributes:
        mean: of the estimate of the ELBO.
        error: the mean's standard error.
        deviation: standard deviation of the estimate for one example and one t.
        gradient: √E‖g - E g‖² of the gradient for one example and one t.
    """

    mean: float
    error: float
    deviation: float
    gradient: float


def single_step(model: DDPMLightningModule, x: Tensor) -> Tensor:
    """Estimates the ELBO of each example from one t, in both forms and from the same draws: (B, C, H, W) -> (2, B), nats.

    t ~ U{1..T-1} and (x_{t-1}, x_t, x_{t+1}) drawn together: the two-variable form takes the KL of step t + 1 at x_{t+1}, the
    three-variable form the log ratio at x_t. Common draws make the ratio of their deviations precise.
    """
    process, x0, last = model.process, model.to_unit(x), model.num_steps
    cost, _ = model.first_draws(x, x0)
    top = torch.full((len(x),), last)
    before_last = process.marginal(x0, top - 1).sample()
    prior = kl(process.step(before_last, top), DiagGaussian.standard(x0))
    t = torch.randint(1, last, (len(x),))
    start = torch.where((t > 1).view(-1, 1, 1, 1), process.marginal(x0, (t - 1).clamp(min=1)).sample(), x0)
    step = process.step(start, t)
    x_t = step.sample()
    x_above = process.step(x_t, t + 1).sample()
    output = model.network(x_above, t + 1)
    reverse = process.reverse(output, x_above, t + 1, model.parameterization, model.clip)
    two = -cost - process.prior_kl(x0) - (last - 1) * kl(process.posterior(x0, x_above, t + 1), reverse)
    three = -cost - prior - (last - 1) * (step.log_prob(x_t) - reverse.log_prob(x_t))
    return torch.stack([two, three])


def measure(model: DDPMLightningModule, images: Tensor, batches: int) -> tuple[Noise, Noise]:
    """Draws values for all images ``batches`` times, and gradients one example at a time for some: (two, three)."""
    with torch.no_grad():
        values = torch.cat([single_step(model, images).double() for _ in range(batches)], 1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    sums: list[Tensor | float] = [0.0, 0.0]  # all gradients at once would take many GB
    squares: list[Tensor | float] = [0.0, 0.0]
    for index in torch.randint(len(images), (GRADIENTS,)).tolist():
        for k, form in enumerate(single_step(model, images[index : index + 1])):
            parts = torch.autograd.grad(form.sum(), parameters, allow_unused=True, retain_graph=True)
            gradient = torch.cat([p.flatten().double() for p in parts if p is not None])
            sums[k], squares[k] = sums[k] + gradient, squares[k] + gradient.square().sum()
    noises = []
    for form, total, square in zip(values, sums, squares, strict=True):
        spread = (square - total.square().sum() / GRADIENTS) / (GRADIENTS - 1)
        deviation = form.std().item()
        noises.append(Noise(form.mean().item(), deviation / math.sqrt(len(form)), deviation, spread.sqrt().item()))
    return noises[0], noises[1]


def printed_consistency_kl(betas: list[float], s2: float) -> float:
    """Returns the "ELBO" that tutorials print: E KL(q(x_t|x_{t-1}) ‖ p(x_t|x_{t+1})) for the last sum, optimal predictor, nats.

    Wrong for every T ≥ 2: given both neighbours, x_t does not follow q(x_t|x_{t-1}).
    """
    bars = [1.0]
    for beta in betas:
        bars.append(bars[-1] * (1 - beta))
    last = len(betas)
    tilde = [0.0, 0.0] + [betas[t - 1] * (1 - bars[t - 1]) / (1 - bars[t]) for t in range(2, last + 1)]

    def gain(t: int) -> float:  # μ_θ(x_t, t) = gain · x_t
        noise = 1 - bars[t]
        c = math.sqrt(noise) / (bars[t] * s2 + noise)
        return (1 - betas[t - 1] * c / math.sqrt(noise)) / math.sqrt(1 - betas[t - 1])

    first = gain(1)
    error = (1 - first * math.sqrt(bars[1])) ** 2 * s2 + first**2 * (1 - bars[1])
    value = -0.5 * math.log(2 * math.pi * tilde[2]) - error / (2 * tilde[2])
    before = bars[last - 1] * s2 + 1 - bars[last - 1]
    value -= 0.5 * ((1 - betas[-1]) * before + betas[-1] - 1 - math.log(betas[-1]))
    for t in range(1, last):
        below = bars[t - 1] * s2 + 1 - bars[t - 1]  # E[x_{t-1}²]
        alpha, above, g = 1 - betas[t - 1], 1 - betas[t], gain(t + 1)
        # √α x_{t-1} - g x_{t+1}, with x_{t+1} = √α_{t+1} x_t + noise and x_t = √α x_{t-1} + noise
        mean_part = (math.sqrt(alpha) - g * math.sqrt(above * alpha)) ** 2 * below
        noise_part = g**2 * (above * betas[t - 1] + betas[t])
        value -= 0.5 * (math.log(tilde[t + 1] / betas[t - 1]) + (betas[t - 1] + mean_part + noise_part) / tilde[t + 1] - 1)
    return value


def study(batches: int) -> dict[str, dict[int, dict[str, Noise | float]]]:
    """Measures both forms for every T: {data: {T: {two, three, exact}}}."""
    found: dict[str, dict[int, dict[str, Noise | float]]] = {"linear-Gaussian": {}, "digits": {}}
    images = digits()
    for length in LENGTHS:
        torch.manual_seed(0)
        model = linear_gaussian(length, S2, SCALE)
        x = math.sqrt(S2) * torch.randn(4096, 1, 1, 1, dtype=torch.float64)
        two, three = measure(model, x, 4 * batches)
        exact = linear_gaussian_elbo(model.process.betas[1:].tolist(), S2, SCALE)
        found["linear-Gaussian"][length] = {"two": two, "three": three, "exact": exact}
        two, three = measure(trained_digits(length, images["train"], log_snr_linear), images["test"], batches)
        found["digits"][length] = {"two": two, "three": three}
        print(f"T = {length} done", flush=True)
    return found


def rows(found: dict[int, dict[str, Noise | float]], with_exact: bool) -> list[str]:
    """Returns the lines of a Markdown table."""
    exact = "exact | " if with_exact else ""
    lines = [
        f"| T | {exact}two-variable mean | three-variable mean | sd of value, two | three | ratio "
        "| sd of gradient, two | three | ratio |",
        "|---|" + "---|" * (8 + with_exact),
    ]
    for length, cell in found.items():
        two, three = cell["two"], cell["three"]
        known = f"{cell['exact']:.4f} | " if with_exact else ""
        lines.append(
            f"| {length} | {known}{two.mean:.3f} ± {two.error:.3f} | {three.mean:.3f} ± {three.error:.3f} "
            f"| {two.deviation:.3g} | {three.deviation:.3g} | {three.deviation / two.deviation:.4g} "
            f"| {two.gradient:.3g} | {three.gradient:.3g} | {three.gradient / two.gradient:.4g} |"
        )
    return lines


def plot(found: dict[str, dict[int, dict[str, Noise | float]]]) -> plt.Figure:
    """Returns the plot of the ratios over T."""
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), dpi=140, layout="constrained", sharey=True)
    for axis, (name, cells) in zip(axes, found.items(), strict=True):
        for what, colour in (("deviation", BLUE), ("gradient", ORANGE)):
            ratio = [getattr(cell["three"], what) / getattr(cell["two"], what) for cell in cells.values()]
            axis.loglog(list(cells), ratio, "o-", color=colour, label={"deviation": "value", "gradient": "gradient"}[what])
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xlabel="T", title=name)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("sd, three-variable / two-variable")
    figure.suptitle("Noise of one random t: the consistency form against the denoising form", fontsize=10)
    return figure


def document(found: dict[str, dict[int, dict[str, Noise | float]]]) -> str:
    """Returns docs/estimators.md."""
    betas = linear(1000).tolist()
    wrong, right = printed_consistency_kl(betas, 1.0), linear_gaussian_elbo(betas, 1.0, 1.0)
    return "\n".join(
        [
            "# Two forms of one bound",
            "",
            "Written by `python -m benchmarks.estimators`; nats per example. Each estimate uses one random t for an example.",
            "Both forms are unbiased for the same ELBO and see the same draws here; the consistency form is the noisier",
            "one for a single t and for its gradient, increasingly so with T. Over a whole chain neighbouring terms cancel,",
            "and its value is not noisier. With few steps digits are so badly modelled that the misfit hides the difference.",
            "",
            "![ratio of the standard deviations](images/estimators.png)",
            "",
            f"## Linear-Gaussian data, x ~ N(0, {S2}), cosine schedule, a linear predictor whose "
            f"v̂ = √ᾱ_t ε̂ − √(1−ᾱ_t) x̂₀ is {SCALE} of the optimal one",
            "",
            *rows(found["linear-Gaussian"], True),
            "",
            "## Digits: a small MLP after 300 steps for each T, log_snr_linear schedule, lattice prediction, test images",
            "",
            *rows(found["digits"], False),
            "",
            "## The closed form that tutorials print",
            "",
            "Pulling a KL(q(x_t|x_{t-1}) ‖ p(x_t|x_{t+1})) out of the consistency term is wrong for every T ≥ 2: given both",
            "neighbours, x_t does not follow q(x_t|x_{t-1}). For x ~ N(0, 1), the linear schedule, T = 1000 and the optimal",
            f"predictor it gives {wrong:.2f} nats, where the ELBO is {right:.4f}.",
            "",
        ]
    )


def _plain(found: dict[str, dict[int, dict[str, Noise | float]]]) -> dict[str, Any]:
    """Returns what was found as plain values."""
    return {
        name: {
            length: {what: asdict(value) if isinstance(value, Noise) else value for what, value in cell.items()}
            for length, cell in cells.items()
        }
        for name, cells in found.items()
    }


def main() -> None:
    """Measures, prints the document, and writes it with its plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=20, help="times that all examples are drawn for each mean")
    add_out(parser)
    settings = parser.parse_args()
    found = study(settings.batches)
    text = document(found)
    figures = {"batches": settings.batches, "gradients": GRADIENTS, **_plain(found)}
    write_page("estimators", settings.out, text, figures, plot(found))
    print(text)


if __name__ == "__main__":
    main()
