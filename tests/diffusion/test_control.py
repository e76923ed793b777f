"""Control variates must have the mean they claim: any error in it is a bias of the bound (tests/evaluation/test_control.py)."""

import math

import pytest
import torch
from scipy.integrate import quad
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion.control
from diffusion import GaussianDiffusion, constant, cosine, linear, log_snr_linear
from diffusion.control import DENOISERS, Control, level_counts, level_frequencies
from losses import to_unit

SCHEDULES = {"linear": linear, "log_snr_linear": log_snr_linear, "cosine": cosine}


def only(process, t, denoiser):
    factors = torch.zeros(process.num_steps + 1, DENOISERS)
    factors[t, denoiser] = 1.0
    return factors


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [1, 2, 10, 40])
def test_expectations_of_single_pixels_against_adaptive_quadrature(levels, schedule, t):
    process = GaussianDiffusion(SCHEDULES[schedule](40))
    frequencies = torch.rand(levels, dtype=torch.float64) + 0.05
    frequencies /= frequencies.sum()
    control = Control(process, frequencies, only(process, t, 1))
    place = to_unit(torch.arange(levels), levels, torch.float64)
    signal, noise = process.sqrt_alpha_bar[t].item(), process.noise_std[t].item()
    for level in sorted({0, levels // 2, levels - 1}):

        def cost(e, level=level):
            log_p = (frequencies.log() - 0.5 * ((signal * place[level] + noise * e - signal * place) / noise) ** 2).log_softmax(
                0
            )
            if t == 1:
                return -log_p[level].item()
            return control.weights[t].item() * (place[level] - (log_p.exp() * place).sum()).item() ** 2

        expected, _ = quad(
            lambda e: cost(e) * math.exp(-e * e / 2) / math.sqrt(2 * math.pi), -8.5, 8.5, limit=400, epsabs=1e-11
        )
        pixel = torch.full((1, 1, 1, 1), level, dtype=torch.uint8)
        first, steps = control.totals(pixel)
        assert (first if t == 1 else steps).item() == pytest.approx(expected, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("levels", [3, 17, 256])
@pytest.mark.parametrize("noise", [1e-4, 1e-3, 4e-3, 0.03, 0.3, 0.99])
def test_finer_nodes_change_nothing(levels, noise):
    """The first step of a chain has 1 - ᾱ_1 = β_1; levels that hardly occur count from afar."""
    process = GaussianDiffusion(torch.tensor([noise**2, 0.5], dtype=torch.float64))
    frequencies = torch.rand(levels, dtype=torch.float64) ** 8 + 1e-7
    frequencies /= frequencies.sum()
    found = []
    for fine in (1, 4):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("STEP", "LEAST_STEP"):
                patch.setattr(f"diffusion.control.{name}", getattr(diffusion.control, name) / fine)
            found.append(Control(process, frequencies, only(process, 1, 1))._pixel(1))
    apart = 1 / (levels - 1) / noise  # half a gap, in standard deviations
    for rough, exact in zip(*found, strict=True):
        torch.testing.assert_close(rough, exact, rtol=1e-8, atol=1e-12)
    assert (found[1][1] < 1e-9).all() == (apart > 9)


def test_256_levels_and_a_thousand_steps_take_memory_for_one_step_only():
    control = Control(GaussianDiffusion(linear(1000)), torch.full((256,), 1 / 256, dtype=torch.float64), torch.ones(1001, 2))
    largest = [0]

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest[0] = max(largest[0], out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Sizes():
        control.totals(torch.zeros(1, 1, 1, 1, dtype=torch.uint8))
    assert largest[0] < 2**20


@pytest.mark.parametrize("denoiser", [0, 1])
def test_costs_average_to_their_totals(denoiser):
    process = GaussianDiffusion(log_snr_linear(20))
    x = torch.randint(0, 17, (1, 3, 4, 4)).to(torch.uint8)
    x0 = to_unit(x, 17).expand(40_000, -1, -1, -1)
    for t in (2, 7, 20):
        control = Control(process, level_frequencies(level_counts(x, 17)), only(process, t, denoiser))
        steps = torch.full((40_000,), t)
        costs = control.step(x0, process.marginal(x0, steps).sample(), steps).double()
        assert abs(costs.mean() - control.totals(x)[1].item()) < 4.5 * costs.std() / 200


@pytest.mark.parametrize("beta", [0.1, 0.9])  # ᾱ_T is e^-105, and 0 in float64
def test_costs_are_finite_where_next_to_nothing_of_the_signal_is_left(beta):
    process = GaussianDiffusion(constant(1000, beta=beta))
    x = torch.randint(0, 17, (1, 1, 4, 4)).to(torch.uint8)
    x0 = to_unit(x, 17).expand(20_000, -1, -1, -1)
    steps = torch.full((20_000,), 1000)
    control = Control(process, level_frequencies(level_counts(x, 17)), only(process, 1000, 0))
    costs = control.step(x0, process.marginal(x0, steps).sample(), steps).double()
    assert costs.isfinite().all()
    assert abs(costs.mean() - control.totals(x)[1].item()) < 4.5 * costs.std() / math.sqrt(20_000)


def test_continuous_data_has_the_first_denoiser_alone():
    process = GaussianDiffusion(cosine(10))
    control = Control(process, None, torch.ones(11, DENOISERS))
    x = torch.randn(5, 1, 2, 2)
    t = torch.full((5,), 4)
    costs = control.costs(x, process.marginal(x, t).sample(), t)
    assert (costs[:, 0] > 0).all()
    assert (costs[:, 1] == 0).all()
    assert control.first_cost(x, x).eq(0).all()
    assert control.totals(x)[1].unique().numel() == 1


def test_no_level_is_impossible():
    found = level_frequencies(level_counts(torch.zeros(2, 1, 3, 3, dtype=torch.uint8), 5))
    assert found.tolist() == pytest.approx([18.5 / 20.5] + 4 * [0.5 / 20.5])


@pytest.mark.parametrize("noise", [2e-3, 4e-3])
@pytest.mark.parametrize("level", [0, 1, 100, 255])
def test_nodes_of_each_level_against_adaptive_quadrature(noise, level):
    """Where the noise is so small that each level has nodes of its own."""
    process = GaussianDiffusion(torch.tensor([noise**2, 0.5], dtype=torch.float64))
    frequencies = torch.rand(256, dtype=torch.float64) + 0.05
    frequencies /= frequencies.sum()
    surprise, surprise_square, error, error_square = Control(process, frequencies, only(process, 1, 1))._pixel(1)
    place = to_unit(torch.arange(256), 256, torch.float64)
    signal, std = process.sqrt_alpha_bar[1].item(), process.noise_std[1].item()

    def log_p(e):
        return (frequencies.log() - 0.5 * ((signal * (place[level] - place) + std * e) / std) ** 2).log_softmax(0)

    def mean(cost):
        def weighed(e):
            return cost(log_p(e)) * math.exp(-e * e / 2) / math.sqrt(2 * math.pi)

        return quad(weighed, -8.5, 8.5, limit=400, epsabs=1e-11)[0]

    assert surprise[level].item() == pytest.approx(mean(lambda p: -p[level].item()), rel=1e-8, abs=1e-10)
    assert surprise_square[level].item() == pytest.approx(mean(lambda p: p[level].item() ** 2), rel=1e-8, abs=1e-10)
    expected = mean(lambda p: (place[level] - (p.exp() * place).sum()).item() ** 2)
    assert error[level].item() == pytest.approx(expected, rel=1e-8, abs=1e-12)
    expected = mean(lambda p: 1e8 * (place[level] - (p.exp() * place).sum()).item() ** 4)  # above what quad looks at
    assert 1e8 * error_square[level].item() == pytest.approx(expected, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("gap", [0.3, 1.5, 4.0])
def test_the_first_costs_mean_and_variance_are_those_of_draws(levels, gap):
    noise = 1 / (1 + (gap * (levels - 1) / 2) ** 2)  # the levels stand ``gap`` standard deviations of x_1 apart
    process = GaussianDiffusion(torch.tensor([noise, 0.5], dtype=torch.float64))
    frequencies = torch.linspace(1, 5, levels, dtype=torch.float64)
    control = Control(process, frequencies / frequencies.sum(), only(process, 1, 1))
    images = torch.randint(levels, (4, 1, 2, 2), dtype=torch.uint8)
    many = images.repeat_interleave(20_000, 0)
    x_1 = process.marginal(to_unit(many, levels, torch.float64), 1).sample()
    costs = control.first_cost(many, x_1).view(4, -1)
    mean, variance = control.totals(images)[0], control.first_variance(level_counts(images, levels))
    assert ((costs.mean(1) - mean).abs() < 5 * (variance / 20_000).sqrt()).all()
    spread = (costs - mean[:, None]).square()
    assert ((spread.mean(1) - variance).abs() < 5 * spread.std(1) / math.sqrt(20_000)).all()


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_the_second_denoisers_second_moment_is_that_of_draws(levels):
    process = GaussianDiffusion(log_snr_linear(10))
    images = torch.randint(levels, (3, 1, 2, 2), dtype=torch.uint8)
    images[0] = images[0, 0, 0, 0]
    counts = level_counts(images, levels)
    assert counts.sum(1).tolist() == [4, 4, 4]
    control = Control(process, level_frequencies(counts), torch.ones(11, DENOISERS))
    x0 = to_unit(images.repeat_interleave(20_000, 0), levels, torch.float64)
    for t in (3, 6, 10):
        steps = torch.full((len(x0),), t)
        squares = control.costs(x0, process.marginal(x0, steps).sample(), steps)[:, 1].square()
        assert abs(squares.mean() - control.second_moment(t, counts)) < 5 * squares.std() / math.sqrt(len(x0))
