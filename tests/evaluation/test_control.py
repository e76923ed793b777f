"""Control variates take noise out of an estimate and leave its mean alone, however ill they fit."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from diffusion import X0, Epsilon, Lattice, log_snr_linear
from diffusion.control import Control, level_counts
from evaluation.estimate import estimate_bound
from evaluation.estimators import Default, Full, Stratified
from evaluation.profile import STEPS, measure_steps
from evaluation.setting import Setting, SplitImages
from runs.build import SettingError
from tests.diffusion.test_schedules import betas_of
from tests.evaluation.models import LEVELS, cpu, gathered, odd_images, rows_of, small_ddpm
from tests.evaluation.test_bound import SHAPE, exact_importance, imperfect
from tests.evaluation.test_rows import PROPOSAL, apart, bound
from tests.lightning_modules.test_ddpm import ddpm, linear_model
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
    control = measure_steps(model, rows_of(images, 1, purpose="profile"), level_counts(images, LEVELS), cpu(), 256).control
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
        control = measure_steps(model, rows_of(images, 1, seed, "profile"), level_counts(images, LEVELS), cpu(), 2048).control
        assert control.totals(images)[0].max() < 0.02  # nats, b_1 E[c_1]: what is added to a figure where no draw takes it away


def blank_but_for(num, every, lit):
    """Binary images, most of them empty."""
    images = torch.zeros(num, 1, 4, 4, dtype=torch.uint8)
    images[::every, 0, :lit] = 1
    return images


@pytest.mark.parametrize(
    ("levels", "images"),
    [
        *((2, (odd_images(64)[torch.arange(1, num + 1) * 6] > 8).to(torch.uint8)) for num in (2, 4, 10)),
        *((LEVELS, odd_images(64)[torch.arange(1, num + 1) * 6]) for num in (2, 4, 10)),
        (2, blank_but_for(200, 40, 1)),
        (2, blank_but_for(60, 59, 4)),
    ],
)
def test_no_figure_is_what_its_control_adds_however_few_or_rare_the_images_are(levels, images):
    torch.manual_seed(2)
    model = ddpm(Epsilon(), 100, levels=levels, schedule=log_snr_linear).eval()
    for seed in range(8):
        cfg = OmegaConf.create({"max_images": None, "seed": seed, "batch_size": 2048})
        setting = Setting(cfg, model, SplitImages(images, len(images), levels), cpu())
        rows = setting.rows(32 // min(len(images), 32), "profile", 32)
        moments = measure_steps(model, rows, setting.level_counts(), cpu(), 2048)
        # b² E[c²] is not above the pilot's E[KL²]
        assert moments.control.totals(images)[1].mean() < 1.3 * moments.root_mean_squares.sum()


class LateError(torch.nn.Module):
    """An x̂_0 of x_0 = 0 whose KL is 1 nat a pixel at t = T and 0.01 before, as after a few epochs."""

    def __init__(self, process):
        super().__init__()
        costs = torch.full_like(process.betas, 0.01).index_fill(0, torch.tensor([process.num_steps]), 1.0)
        self.errors = (costs / process.x0_weight).sqrt()

    def forward(self, x, t):
        return self.errors[t].view(-1, 1, 1, 1).expand_as(x)


@pytest.mark.parametrize("num_steps", [2, 3, 50, 100, 400])
def test_measured_steps_add_up_where_the_last_one_stands_out(num_steps):
    model = ddpm(X0(), num_steps, levels=None).double().eval()
    model.network = LateError(model.process)
    moments = measure_steps(model, rows_of(torch.zeros(4, *model.image_shape), 1, purpose="profile"), None, cpu(), 2048)
    assert moments.means.sum().item() / model.num_dims == pytest.approx(1 + 0.01 * (num_steps - 2))
    assert moments.num_steps <= STEPS + math.log2(num_steps)


@pytest.mark.parametrize("step", [1, 7])
def test_a_kl_that_is_none_is_said_so(step):
    class Broken(torch.nn.Module):
        def forward(self, x, t):
            return torch.where((t == step).view(-1, 1, 1, 1), math.nan, 0.0) * x

    model, images = small_ddpm(12, Epsilon()), odd_images(8)
    model.network = Broken()
    settings = {"max_images": None, "seed": 0, "batch_size": 64, "precision": 0.1, "replicates": None, "split": "test"}
    setting = Setting(OmegaConf.create(settings), model, SplitImages(images, 8, LEVELS), cpu())
    for estimator in (Default(), Full(), Stratified(5)):
        with pytest.raises(SettingError, match=r"the bound is (nan|not finite)"):
            estimate_bound(setting, estimator)
