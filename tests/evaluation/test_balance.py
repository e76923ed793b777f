"""Posteriors made by hand, whose KLs, active units and information about the image are known."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import norm
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from evaluation import balance
from evaluation.balance import ACTIVE, measure_latents
from lightning_modules import MarkovPosterior, MHVAELightningModule, TopDownPosterior, VAELightningModule
from losses import DiagGaussian, Gaussian
from tests.evaluation.models import cpu, rows_of


class Encoder(nn.Module):
    """x -> N(means(x), stds²): the image is one number."""

    def __init__(self, means, stds):
        super().__init__()
        self.means, self.stds = means, stds

    def forward(self, x):
        mean = torch.stack([one(x.flatten()) for one in self.means], 1)
        return DiagGaussian(mean, torch.tensor(self.stds).double().log().expand_as(mean))


class Affine(nn.Module):
    def __init__(self, slope, std):
        super().__init__()
        self.slope, self.std = slope, std

    def forward(self, z):
        return DiagGaussian(self.slope * z, torch.tensor(math.log(self.std)).double())


class Decoder(nn.Module):
    def forward(self, z):
        return torch.zeros(len(z), 2, 1, 1, dtype=torch.float64)


COMMON = {"image_shape": (1, 1, 1), "levels": None, "likelihood": Gaussian()}


def vae(means, stds):
    return VAELightningModule(Encoder(means, stds), Decoder(), latent_dim=len(stds), **COMMON).double()


def measured(model, x, replicates=8, seed=0, batch_size=1000):
    rows = rows_of(x.double().view(-1, 1, 1, 1), replicates, seed, "balance")
    return measure_latents(model, rows, cpu(), batch_size, lambda _: None)


def kl(mean, std):
    return 0.5 * (mean**2 + std**2 - 1) - math.log(std)


def nothing(x):
    return torch.zeros_like(x)


def test_each_unit_has_its_kl_and_activity():
    num = 2000
    x = torch.tensor(norm.ppf((torch.arange(num) + 0.5) / num)).double()  # as even as N(0, 1) can be
    spread = [1.0, 1.3 * math.sqrt(ACTIVE), 0.7 * math.sqrt(ACTIVE), 0.0]
    stds = [0.3, 1.0, 0.5, 1.0]
    model = vae([lambda x, a=a: a * x for a in spread], stds)
    (level,), _ = measured(model, x)
    expected = [kl(a, std) for a, std in zip(spread, stds, strict=True)]  # E x² = 1
    assert level.kl.tolist() == pytest.approx(expected, rel=5e-3)  # as far as the grid's E x² is not 1
    assert level.kl[3].item() == 0
    assert level.mean_variance.tolist() == pytest.approx([a**2 for a in spread], rel=0.01, abs=1e-12)
    assert level.active == 2
    assert level.aggregate_mean.abs().max() < 4 / math.sqrt(8 * num)
    assert level.aggregate_variance.tolist() == pytest.approx(
        [a**2 + std**2 for a, std in zip(spread, stds, strict=True)], rel=0.06
    )


def test_batches_change_nothing_and_seeds_do():
    model, x = vae([torch.sin, nothing], [0.4, 0.9]), torch.linspace(-2, 2, 30)
    (whole,), aggregate = measured(model, x)
    (pieces,), again = measured(model, x, batch_size=7)
    (other,), _ = measured(model, x, seed=1)
    torch.testing.assert_close(whole.kl, pieces.kl, rtol=0, atol=1e-10)
    torch.testing.assert_close(whole.aggregate_variance, pieces.aggregate_variance, rtol=0, atol=1e-10)
    assert again == pytest.approx(aggregate, abs=1e-10)
    torch.testing.assert_close(other.kl, whole.kl)  # no draw is in it
    assert (other.aggregate_mean != whole.aggregate_mean).all()


@pytest.mark.parametrize("num", [2, 50, 300])
def test_posteriors_far_apart_know_which_image_it_was(num):
    x = torch.arange(num) * 20.0
    (level,), aggregate = measured(vae([lambda x: x], [0.5]), x)
    assert aggregate["mutual_information"] == pytest.approx(math.log(num), abs=1e-6)
    assert aggregate["marginal_kl"] == pytest.approx(level.kl.sum().item() - math.log(num), rel=1e-2)


def test_a_collapsed_posterior_knows_nothing_and_misses_nothing():
    (level,), aggregate = measured(vae([nothing, nothing], [1.0, 1.0]), torch.arange(100.0))
    assert level.active == 0
    assert aggregate == pytest.approx({"mutual_information": 0.0, "marginal_kl": 0.0}, abs=1e-9)


@pytest.mark.parametrize("std", [0.3, 0.8])
def test_an_aggregate_that_is_the_prior_leaves_information_only(std):
    """Means N(0, 1 - σ²) over images: q(z) = N(0, 1), and the KL is all information, -ln σ."""
    num = 3000
    x = torch.tensor(norm.ppf((torch.arange(num) + 0.5) / num)).double() * math.sqrt(1 - std**2)
    (level,), aggregate = measured(vae([lambda x: x], [std]), x, replicates=2)
    assert abs(aggregate["marginal_kl"]) < 0.01
    assert aggregate["mutual_information"] == pytest.approx(-math.log(std), abs=4 / math.sqrt(num))
    assert level.kl.sum().item() == pytest.approx(-math.log(std), abs=4 / math.sqrt(num))


def test_information_is_the_same_whatever_the_prior():
    """Which decides what the aggregate posterior costs: KL(N(0, 1) ‖ N(m, s²)) where it is standard normal."""

    class Elsewhere(VAELightningModule):
        def latents_of(self, x):
            (latent,) = super().latents_of(x)
            p = DiagGaussian(torch.full_like(latent.z, 2.0), torch.full_like(latent.z, math.log(2)))
            return [replace(latent, p=p)]

    num, std = 3000, 0.5
    x = torch.tensor(norm.ppf((torch.arange(num) + 0.5) / num)).double() * math.sqrt(1 - std**2)
    model = Elsewhere(Encoder([lambda x: x], [std]), Decoder(), latent_dim=1, **COMMON).double()
    _, aggregate = measured(model, x, replicates=2)
    assert aggregate["mutual_information"] == pytest.approx(-math.log(std), abs=0.02)
    assert aggregate["marginal_kl"] == pytest.approx(math.log(2) + (1 + 2**2) / 8 - 0.5, abs=0.02)


def test_the_two_parts_sum_to_the_mean_kl_over_all_units():
    num = 1500
    x = torch.randn(num)
    model = vae([lambda x: 2 * x, torch.sin, nothing], [0.4, 0.7, 1.3])
    (level,), aggregate = measured(model, x)
    assert sum(aggregate.values()) == pytest.approx(level.kl.sum().item(), rel=1e-12)
    assert 0 < aggregate["mutual_information"] < math.log(num)
    assert aggregate["marginal_kl"] > 0.1  # a mean of variance 4 and a std of 1.3 are not the prior's


@pytest.mark.parametrize("posterior", [MarkovPosterior, TopDownPosterior])
def test_a_hierarchys_units_are_active_by_what_the_image_moves_not_by_the_draw_that_they_follow(posterior):
    """The other level's draw moves a unit's mean by 80 times the threshold: an average over draws has to count it out."""
    means, stds = [lambda x: 2 * x, nothing], [1.0, 1.0]
    lower = Encoder(means, stds)
    if posterior is TopDownPosterior:
        # evidence of z_1, then of z_2; none of it in unit 1
        lower = Encoder([nothing, nothing, lambda x: 2 * x, nothing], [1.0, 1.0, 1.0, 1.0])
    model = MHVAELightningModule(
        posterior(lower, [Affine(0.9, 0.5)], depth=2, latent_dim=2),
        Decoder(), depth=2, latent_dim=2, transition=[Affine(1.8, 1.0)], **COMMON,
    ).double()  # fmt: skip
    levels, aggregate = measured(model, torch.randn(2000))
    assert aggregate == {}
    assert len(levels) == 2
    follower = levels[1] if posterior is MarkovPosterior else levels[0]
    # z_2's mean is 0.9 z_1, or z_1's (0 + 1.8 z_2)/2: the image's part of it has variance 3.24, the draw's 0.81
    assert follower.mean_variance[0].item() == pytest.approx(0.81 * 4, rel=0.15)
    assert follower.mean_variance[1].item() < ACTIVE
    assert [level.active for level in levels] == [1, 1]


def test_a_hierarchys_kls_are_the_bounds():
    model = MHVAELightningModule(
        MarkovPosterior(Encoder([lambda x: x, nothing], [0.5, 1.0]), [Affine(0.7, 0.6)], depth=2, latent_dim=2),
        Decoder(), depth=2, latent_dim=2, transition=[Affine(0.9, 0.8)], **COMMON,
    ).double()  # fmt: skip
    x = torch.randn(3000)
    levels, _ = measured(model, x)
    with torch.no_grad():
        kls = torch.stack([model.latent_kls(x.double().view(-1, 1, 1, 1)) for _ in range(8)]).mean(0)
    for level, expected in zip(levels, kls, strict=True):
        assert level.kl.sum().item() == pytest.approx(
            expected.mean().item(), abs=4 * 2 * expected.std().item() / math.sqrt(3000)
        )


@pytest.mark.parametrize("std", [0.3, 0.8])
def test_the_split_has_little_noise_where_the_aggregate_is_near_the_prior(std):
    """Either part alone, from draws, would vary by those of ln q(z|x) - ln p(z)."""
    x = torch.tensor(norm.ppf((torch.arange(200) + 0.5) / 200)).double() * math.sqrt(1 - std**2)
    found = torch.tensor([measured(vae([lambda x: x], [std]), x, 2, seed)[1]["mutual_information"] for seed in range(40)])
    plain = math.sqrt((0.5 * (1 - std**2) ** 2 + std**2 * (1 - std**2)) / 200)  # variance of ln q - ln p at one draw
    assert found.std().item() < 0.3 * plain


@pytest.mark.parametrize("num", [3, 20])
def test_the_split_of_few_images_has_no_bias(num):
    """A control's coefficient that is fitted to the draws that it corrects would give the first some fifth too little."""
    generator = torch.Generator().manual_seed(num)
    mean, log_std = (
        torch.randn(num, 1, generator=generator).double(),
        0.2 * torch.randn(num, 1, generator=generator).double() - 0.7,
    )
    q = DiagGaussian(mean, log_std)
    grid = torch.linspace(-12, 12, 40_001).double()
    log_q = MixtureSameFamily(Categorical(torch.ones(num)), Normal(mean[:, 0], log_std[:, 0].exp())).log_prob(grid)
    exact = torch.trapezoid(log_q.exp() * (log_q - Normal(0.0, 1.0).log_prob(grid)), grid).item()
    prior = DiagGaussian.standard(mean)
    kls = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).sum(1)
    found = []
    torch.manual_seed(0)
    for _ in range(2000):
        z = torch.stack([q.sample(), q.sample()], 1)
        log_p = torch.stack([prior.log_prob(draw) for draw in z.unbind(1)], 1)
        found.append(balance._surgery(q, z, log_p, kls)["marginal_kl"])
    found = torch.tensor(found)
    if num == 3:  # plain draws never say more than which image it was
        assert (kls.mean() - found).max() <= math.log(num) + 1e-12
    assert found.mean().item() == pytest.approx(exact, abs=4 * found.std().item() / math.sqrt(2000))


def test_an_evaluation_holds_no_more_of_a_hierarchys_numbers_than_a_batch_of_them(monkeypatch):
    held = []
    usual = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts, *rest: (held.append(sum(map(len, parts))), usual(parts, *rest))[1])
    model = MHVAELightningModule(
        MarkovPosterior(Encoder([lambda x: x], [0.5]), [Affine(0.7, 0.6)], depth=2, latent_dim=1),
        Decoder(), depth=2, latent_dim=1, transition=[Affine(0.9, 0.8)], **COMMON,
    ).double()  # fmt: skip
    measured(model, torch.randn(300), batch_size=20)
    assert max(held) < 20 + 8


@pytest.mark.parametrize(("std", "digits"), [(1.0, 1e-12), (1e-3, 1e-7), (1e-5, 1e-2)])
def test_the_aggregate_posterior_is_the_mixture_of_all(std, digits, monkeypatch):
    monkeypatch.setattr(balance, "AT_ONCE", 7)
    log_std = torch.randn(40, 6).double() + math.log(std)
    q = DiagGaussian(torch.randn(40, 6).double(), log_std)
    parts = Independent(Normal(q.mean, log_std.exp()), 1)
    mixture = MixtureSameFamily(Categorical(torch.ones(40).double()), parts)
    z = torch.cat([q.sample(), torch.randn(3, 6).double()])
    torch.testing.assert_close(balance._mixture_log_prob(q, z), mixture.log_prob(z), rtol=1e-6, atol=digits)
