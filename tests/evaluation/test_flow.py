"""The probability flow where its likelihood is known: it only rescales Gaussian data."""

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import PchipInterpolator
from torch import nn

import diffusion
from diffusion import X0, Epsilon, Lattice
from evaluation.flow import ProbabilityFlow
from lightning_modules import DDPMLightningModule
from losses import to_unit
from networks import MLPDenoiser
from tests.diffusion.test_schedules import betas_of
from tests.evaluation.models import LEVELS, gathered, odd_images, rows_of


class Real(nn.Module):
    """What predicts N(0, s²) data best at real t, ln SNR between the steps as the flow has it."""

    def __init__(self, betas, s2, slope=None):
        super().__init__()
        signal = (1 - betas).log().cumsum(0)
        log_snr = (signal - (1 - signal.exp()).log()).numpy()
        self.s2, self.slope = s2, slope
        if len(betas) > 1:
            time = PchipInterpolator(log_snr[::-1], np.arange(len(betas), 0.0, -1.0))
            self.fine = np.linspace(log_snr[0], log_snr[-1], 20_001)
            self.times = time(self.fine)

    def forward(self, x, t):
        bar = torch.from_numpy(np.interp(t.double().numpy(), self.times, self.fine)).sigmoid().view(-1, 1, 1, 1)
        return self.slope(bar, x) if self.slope else (1 - bar).sqrt() / (bar * self.s2 + 1 - bar) * x


def real_model(betas, s2, shape=(1, 1, 2), levels=None, slope=None, parameterization=None):
    network = Real(betas, s2, slope)
    parameterization = parameterization or Epsilon()
    return DDPMLightningModule(
        network, lambda _: betas, len(betas), parameterization, image_shape=shape, levels=levels
    ).double()


def clean(s2):
    """What predicts x_0 best."""
    return lambda bar, x: bar.sqrt() * s2 / (bar * s2 + 1 - bar) * x


def exact(betas, s2, y):
    """ln p(y) by the flow x_1 -> x_T = x_1 √(v_T/v_1), v_t = ᾱ_t s² + 1 - ᾱ_t, in plain Python for each dimension."""
    first, last = 1 - betas[0].item(), math.prod((1 - betas).tolist())
    v_first, v_last = first * s2 + 1 - first, last * s2 + 1 - last
    x_last = math.sqrt(first) * y * math.sqrt(v_last / v_first)
    per_dim = -0.5 * math.log(2 * math.pi) - 0.5 * x_last.square() + 0.5 * math.log(v_last / v_first) + 0.5 * math.log(first)
    return per_dim.flatten(1).sum(1)


Y = torch.linspace(-2, 2, 10, dtype=torch.float64).view(5, 1, 1, 2)


@pytest.mark.parametrize("name", ["linear", "cosine", "log_snr_linear", "sigmoid"])
@pytest.mark.parametrize("num_steps", [2, 10, 1000])
def test_gaussian_data_have_the_closed_form(name, num_steps):
    betas = betas_of(name, num_steps)
    for s2 in (0.25, 4.0):
        flow = ProbabilityFlow(real_model(betas, s2), tolerance=1e-6)
        torch.testing.assert_close(flow.log_likelihood(Y), exact(betas, s2, Y), rtol=0, atol=1e-3)
        assert flow.evaluations > 5
        assert flow.describe()["divergence"] == "exact"


def test_a_chain_that_ends_in_less_than_the_smallest_number_has_a_flow_too():
    betas = torch.full((500,), 0.9, dtype=torch.float64)  # ᾱ_T = 1e-500
    model = real_model(betas, 4.0, slope=clean(4.0), parameterization=X0())
    flow = ProbabilityFlow(model, tolerance=1e-6)
    torch.testing.assert_close(flow.log_likelihood(Y), exact(betas, 4.0, Y), rtol=0, atol=1e-3)


def test_predictors_of_clean_images_have_the_same_flow_and_the_default_tolerance_suffices():
    betas, s2 = diffusion.linear(100), 0.25
    for flow in (
        ProbabilityFlow(real_model(betas, s2)),
        ProbabilityFlow(real_model(betas, s2, slope=clean(s2), parameterization=X0())),
    ):
        torch.testing.assert_close(flow.log_likelihood(Y), exact(betas, s2, Y), rtol=0, atol=3e-3)


def test_one_step_has_no_flow():
    betas = diffusion.constant(1, 0.3)
    flow = ProbabilityFlow(real_model(betas, 1.0))
    torch.testing.assert_close(flow.log_likelihood(Y), exact(betas, 1.0, Y), rtol=0, atol=1e-12)
    assert flow.evaluations == 0


def test_a_density_on_the_line_integrates_to_one():
    """With any predictor, as a flow is a change of variables: here one that bends."""

    def bent(bar, x):
        return (1 - bar).sqrt() * (x + 0.7 * torch.sin(3 * x) * bar)

    flow = ProbabilityFlow(real_model(diffusion.cosine(40), None, shape=(1, 1, 1), slope=bent))
    grid = torch.linspace(-6, 6, 601, dtype=torch.float64)
    with torch.no_grad():
        density = flow.log_likelihood(grid.view(-1, 1, 1, 1)).exp()
    assert density.max() / density.mean() > 2
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])  # of the path
def test_a_network_that_gives_nan_on_the_way_has_no_figure_and_an_end(where):
    first, last = (torch.tensor(bar).logit() for bar in (0.9999, 0.01))
    holed = real_model(
        diffusion.log_snr_linear(100, first.item(), last.item()), None, shape=(1, 1, 1),
        slope=lambda bar, x: torch.where(bar <= (first + where * (last - first)).sigmoid() + 1e-4, math.nan, 0.5 * x),
    )  # fmt: skip
    assert ProbabilityFlow(holed).log_likelihood(torch.zeros(2, 1, 1, 1, dtype=torch.float64)).isnan().all()


@pytest.mark.parametrize("u", [0.5, 0.1])
def test_levels_add_the_width_of_their_bins(u, monkeypatch):
    betas, s2 = diffusion.log_snr_linear(100), 0.3
    monkeypatch.setattr("evaluation.flow.rand", lambda shape, device, dtype: torch.full(shape, u, dtype=dtype, device=device))
    x = torch.tensor([[0, 16], [8, 9]], dtype=torch.uint8).view(2, 1, 1, 2)
    flow = ProbabilityFlow(real_model(betas, s2, levels=LEVELS))
    y = to_unit(x.double(), LEVELS) + (u - 0.5) * 2 / (LEVELS - 1)
    expected = exact(betas, s2, y) + 2 * math.log(2 / (LEVELS - 1))
    torch.testing.assert_close(flow.log_likelihood(x), expected, rtol=0, atol=1e-3)


def mixing(bar, x):
    """A predictor whose Jacobian is far from diagonal."""
    shifted = x.flatten(1).roll(1, 1).view_as(x)
    return (1 - bar).sqrt() * (x + bar * torch.tanh(x + 2 * shifted))


def mixing_model(shape=(1, 4, 4), num_steps=20):
    return real_model(diffusion.cosine(num_steps), None, shape=shape, slope=mixing)


def test_hutchinsons_estimate_averages_to_the_exact_divergence():
    model, y = mixing_model(), torch.randn(1, 1, 4, 4, dtype=torch.float64).expand(300, -1, -1, -1)
    known = ProbabilityFlow(model).log_likelihood(y[:1]).item()
    probed = ProbabilityFlow(model, exact_up_to=15)
    assert "Hutchinson" in probed.describe()["divergence"]
    drawn = probed.log_likelihood(y)
    assert drawn.std() > 0.1
    assert abs(drawn.mean() - known) < 4 * drawn.std() / math.sqrt(300)


@pytest.mark.parametrize("exact_up_to", [256, 0])
def test_rows_of_continuous_data_come_back(exact_up_to):
    images = torch.randn(6, 1, 4, 4, dtype=torch.float64)
    flow = ProbabilityFlow(mixing_model(), exact_up_to=exact_up_to)
    values = gathered(rows_of(images, 2), flow.log_likelihood)
    torch.manual_seed(99)
    assert torch.equal(gathered(rows_of(images, 2), flow.log_likelihood), values)
    if exact_up_to:
        assert torch.equal(values[:, 0], values[:, 1])
    else:
        assert (values[:, 0] != values[:, 1]).all()


@pytest.mark.parametrize("parameterization", [Lattice(LEVELS), Epsilon()])
def test_dequantisations_come_back_with_the_seed_whatever_the_batch(parameterization):
    torch.manual_seed(5)
    network = MLPDenoiser((1, 4, 4), parameterization.outputs_per_channel, hidden_dim=16, num_blocks=1)
    schedule = diffusion.log_snr_linear
    model = DDPMLightningModule(network, schedule, 8, parameterization, image_shape=(1, 4, 4), levels=LEVELS).double().eval()
    flow, images = ProbabilityFlow(model, tolerance=1e-6), odd_images(3)
    values = gathered(rows_of(images, 3), flow.log_likelihood)
    assert all(len(row.unique()) == 3 for row in values)
    assert (values < 0).all()
    torch.manual_seed(99)
    assert torch.equal(gathered(rows_of(images, 3), flow.log_likelihood), values)
    # the solver's steps suit the batch as a whole
    torch.testing.assert_close(gathered(rows_of(images, 3), flow.log_likelihood, batch_size=5), values, rtol=0, atol=1e-3)
