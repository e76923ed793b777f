"""Control variates take noise out of an estimate and leave its mean alone, however ill they fit."""

import math

import pytest
import torch

from diffusion import Epsilon, Lattice
from diffusion.control import Control
from evaluation.profile import measure_steps
from tests.diffusion.test_schedules import betas_of
from tests.evaluation.models import LEVELS, cpu, gathered, odd_images, rows_of, small_ddpm
from tests.evaluation.test_bound import SHAPE, exact_importance, imperfect
from tests.evaluation.test_rows import PROPOSAL, apart, bound
from tests.lightning_modules.test_ddpm import linear_model
from tests.linear_gaussian import elbo_terms

SKEWED = torch.arange(1.0, LEVELS + 1).double() / sum(range(LEVELS + 1))


def factors(num_steps, *scales):
    """b_t that fall with t, for each denoiser."""
    return torch.linspace(2, 0.1, num_steps + 1).unsqueeze(1) * torch.tensor(scales)


@pytest.mark.parametrize("parameterization", [Lattice(LEVELS), Epsilon()])
def test_no_images_mean_is_moved(parameterization):
    model, images = small_ddpm(12, parameterization), odd_images(64)
    control = Control(model.process, SKEWED, factors(12, -0.5, -3.0))
    every = gathered(rows_of(images, 60, purpose="full"), bound(model), batch_size=512).squeeze(2)
    plain = gathered(rows_of(images, 100), bound(model, 4, PROPOSAL), batch_size=512).squeeze(2)
    moved = gathered(rows_of(images, 100), bound(model, 4, PROPOSAL, control), batch_size=512).squeeze(2)
    added = moved - plain  # of the same draws, so that what the control adds is all there is
    assert added.abs().mean() > 0.1
    assert (added.mean(1) / added.std(1)).abs().max() * 10 < 4.5
    assert abs(added.mean()) < 4 * added.var(1).sum().sqrt() / 640
    difference, variance = apart(moved, every)
    assert (difference / variance.sqrt()).abs().max() < 4.5


@pytest.mark.parametrize("name", ["linear", "cosine", "log_snr_linear"])
@pytest.mark.parametrize("num_steps", [3, 10, 50])
def test_continuous_data_keep_their_exact_terms(name, num_steps, monkeypatch):
    betas, s2, given = betas_of(name, num_steps), 0.25, imperfect(num_steps)
    model = linear_model(betas, s2, given, shape=SHAPE)
    expected = elbo_terms(betas.tolist(), s2, given)
    for scale in (0.3, -2.0):
        control = Control(model.process, None, factors(num_steps, scale, 5.0))
        terms = exact_importance(model, s2, 2, monkeypatch, control=control)
        assert terms == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_measured_control_lowers_the_noise_and_moves_nothing():
    model, images = small_ddpm(12), odd_images(128)
    control = measure_steps(model, rows_of(images, 1, purpose="profile"), cpu(), 256).control
    plain = gathered(rows_of(images, 40), bound(model, 4, PROPOSAL), batch_size=512).squeeze(2)
    controlled = gathered(rows_of(images, 40), bound(model, 4, PROPOSAL, control), batch_size=512).squeeze(2)
    assert controlled.var(1).mean() < plain.var(1).mean()
    added = controlled - plain
    assert abs(added.mean()) < 4 * added.var(1).sum().sqrt() / math.sqrt(40) / 128


@pytest.mark.parametrize("num_steps", [220, 300, 340])
def test_a_first_cost_that_rare_draws_carry_moves_no_figure(num_steps):
    """The levels stand 8 to 11 standard deviations apart, and 256 draws show next to nothing of what c_1 is made of."""
    images, model = odd_images(32), small_ddpm(num_steps, Epsilon())
    for seed in range(12):
        control = measure_steps(model, rows_of(images, 1, seed, "profile"), cpu(), 2048).control
        assert control.totals(images)[0].max() < 0.02  # nats, b_1 E[c_1]: what is added to a figure where no draw takes it away
