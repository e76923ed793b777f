"""Bounds that tighten with K, where ln p(x) is known."""

import math
from types import SimpleNamespace

import pytest
import torch
from scipy.special import logsumexp
from torch import nn

import diffusion
from evaluation.importance_weighted import importance_weighted
from lightning_modules import MarkovPosterior, MHVAELightningModule, TopDownPosterior, VAELightningModule
from losses import DiagGaussian, Gaussian
from losses.draws import randn_like
from tests.evaluation.models import cpu, gathered, rows_of
from tests.lightning_modules.test_ddpm import linear_model
from tests.linear_gaussian import elbo_terms

SLOPE, STD = 0.8, 0.6  # x = SLOPE · z_1 + STD · ε
TOP_SLOPE, TOP_STD = 0.9, 0.5  # z_1 = TOP_SLOPE · z_2 + TOP_STD · ε


class Affine(nn.Module):
    """z -> N(slope · z, std²), side by side ``copies`` times."""

    def __init__(self, slope, std, slopes=None):
        super().__init__()
        self.slopes, self.std = slopes or [slope], std

    def forward(self, z):
        mean = torch.cat([slope * z.flatten(1) for slope in self.slopes], 1)
        return DiagGaussian(mean, torch.full_like(mean, math.log(self.std)))


class Decoder(nn.Module):
    def forward(self, z):
        return torch.cat([SLOPE * z, torch.full_like(z, math.log(STD))], 1).view(-1, 2, 1, z.shape[1])


COMMON = {"image_shape": (1, 1, 2), "levels": None, "latent_dim": 2, "likelihood": Gaussian()}


def linear_vae(slope, std):
    return VAELightningModule(Affine(slope, std), Decoder(), **COMMON).double()


def linear_mhvae(slope, std, above, above_std):
    posterior = MarkovPosterior(Affine(slope, std), [Affine(above, above_std)], depth=2, latent_dim=2)
    return MHVAELightningModule(posterior, Decoder(), depth=2, transition=[Affine(TOP_SLOPE, TOP_STD)], **COMMON).double()


def ladder(slopes, std):
    posterior = TopDownPosterior(Affine(None, std, slopes), None, depth=2, latent_dim=2)
    return MHVAELightningModule(posterior, Decoder(), depth=2, transition=[Affine(TOP_SLOPE, TOP_STD)], **COMMON).double()


def exact_posterior(variance):
    """Slope and std of p(z_1|x) where z_1 has this variance a priori."""
    marginal = SLOPE**2 * variance + STD**2
    return SLOPE * variance / marginal, math.sqrt(variance * STD**2 / marginal)


TOP_VARIANCE = TOP_SLOPE**2 + TOP_STD**2
ABOVE = TOP_SLOPE / TOP_VARIANCE, math.sqrt(1 - TOP_SLOPE**2 / TOP_VARIANCE)  # p(z_2|z_1)


def chain_variance(betas, factors):
    """The variance of x_0 ~ p_θ of the chain with ε_θ = c_t x and σ_t² = β_t, in plain Python."""
    bars = [1.0]
    for beta in betas:
        bars.append(bars[-1] * (1 - beta))
    variance = 1.0
    for t in range(len(betas), 0, -1):
        beta, noise = betas[t - 1], 1 - bars[t]
        sigma2 = beta if t > 1 else betas[1] * (1 - bars[1]) / (1 - bars[2])
        slope = (1 - beta * factors[t - 1] / math.sqrt(noise)) / math.sqrt(1 - beta)
        variance = slope**2 * variance + sigma2
    return variance


BETAS, FACTORS = diffusion.constant(3, 0.4), [0.5, 0.64, 0.71]  # wide steps, or the weights' variance is infinite
LATENT, CHAIN = SLOPE**2 + STD**2, SLOPE**2 * TOP_VARIANCE + STD**2
MODELS = {  # (model, variance of its x)
    "vae": (linear_vae(0.4, 0.9), LATENT),
    "mhvae": (linear_mhvae(0.5, 0.6, 0.6, 0.9), CHAIN),
    "mhvae top down": (ladder([0.5, 0.3], 0.8), CHAIN),
    "ddpm": (
        linear_model(BETAS, None, FACTORS, shape=(1, 1, 2), variance=diffusion.large),
        chain_variance(BETAS.tolist(), FACTORS),
    ),
}
X = torch.tensor([0.7, -1.1], dtype=torch.float64).view(1, 1, 1, 2)


def log_p(x, variance):
    return (-0.5 * math.log(2 * math.pi * variance) - 0.5 * x.square() / variance).flatten(1).sum(1)


def bounds(model, x, samples, batch_size=4096, purpose="iwae"):
    rows = rows_of(x, samples, purpose=purpose)
    return importance_weighted(model, rows, cpu(), batch_size, lambda _: None)


def many(num):
    return X.expand(num, -1, -1, -1)


@pytest.mark.parametrize("name", MODELS)
def test_one_sample_averages_to_the_bound(name):
    model, _ = MODELS[name]
    one = bounds(model, many(4000), 1)
    elbo = gathered(rows_of(many(4000), 1, purpose="elbo"), lambda x: model.elbo(x).value, batch_size=4096)
    error = math.hypot(one.bounds.std().item(), elbo.std().item()) / math.sqrt(4000)
    assert abs(one.bounds.mean() - elbo.mean()) < 4 * error
    assert torch.equal(one.effective, torch.ones(4000).double())
    assert torch.equal(
        one.bounds, gathered(rows_of(many(4000), 1, purpose="iwae"), model.log_weight, batch_size=4096).flatten()
    )


def test_one_sample_averages_to_what_is_known_of_vae_and_ddpm():
    """ELBO = E ln p(x|z) - KL, by hand."""
    slope, std = 0.4, 0.9
    x = X.flatten()
    square = (x - SLOPE * slope * x).square() + SLOPE**2 * std**2
    reconstruction = -0.5 * math.log(2 * math.pi * STD**2) - square / (2 * STD**2)
    expected = (reconstruction - 0.5 * ((slope * x).square() + std**2 - 1) + math.log(std)).sum()
    one = bounds(MODELS["vae"][0], many(4000), 1).bounds
    assert abs(one.mean() - expected) < 4 * one.std() / math.sqrt(4000)
    drawn = 0.5 * torch.randn(4000, 1, 1, 2, dtype=torch.float64)
    one = bounds(linear_model(BETAS, None, FACTORS, shape=(1, 1, 2)), drawn, 1).bounds
    reconstruction, prior, matching = elbo_terms(BETAS.tolist(), 0.25, FACTORS)
    assert abs(one.mean() - 2 * (reconstruction - prior - matching)) < 4 * one.std() / math.sqrt(4000)


@pytest.mark.parametrize("name", MODELS)
def test_bounds_rise_with_the_number_of_samples_and_end_at_the_likelihood(name):
    model, variance = MODELS[name]
    exact = log_p(X, variance).item()
    levels = [bounds(model, many(num), samples).bounds for num, samples in ((2000, 1), (1500, 2), (800, 5), (300, 30))]
    means, errors = zip(*((one.mean().item(), one.std().item() / math.sqrt(len(one))) for one in levels), strict=True)
    for lower, upper, *pair in zip(means, means[1:], errors, errors[1:], strict=False):
        assert upper - lower > -3 * math.hypot(*pair)
    assert means[-1] - means[0] > 4 * math.hypot(errors[0], errors[-1])
    assert all(mean < exact + 4 * error for mean, error in zip(means, errors, strict=True))
    last = bounds(model, many(2), 8000)
    # ln of a mean of weights has the variance 1/(effective draws), and half of that as its bias
    spread = (1 / last.effective).sqrt()
    assert ((last.bounds - exact).abs() < 4 * spread + 2 / last.effective).all()
    assert spread.max() < 0.05


@pytest.mark.parametrize(
    ("model", "variance"),
    [
        (linear_vae(*exact_posterior(1.0)), LATENT),
        (linear_mhvae(*exact_posterior(TOP_VARIANCE), *ABOVE), CHAIN),
        # DDPM's q is its own posterior where one step of it turns N(0, 1) into N(0, 1)
        (linear_model(diffusion.constant(1, 0.4), 1.0, shape=(1, 1, 2)), 1.0),
    ],
    ids=["vae", "mhvae", "ddpm"],
)
def test_with_the_exact_posterior_every_weight_is_the_likelihood(model, variance):
    x = torch.randn(20, 1, 1, 2, dtype=torch.float64) * 2
    rows = rows_of(x, 7)
    expected = log_p(x[rows.order], variance)
    weights = gathered(rows, model.log_weight).squeeze(2)
    torch.testing.assert_close(weights, expected.unsqueeze(1).expand(-1, 7), rtol=0, atol=1e-6)
    weighted = importance_weighted(model, rows, cpu(), 16, lambda _: None)
    torch.testing.assert_close(weighted.bounds, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(weighted.effective, torch.full((20,), 7.0).double())


@pytest.mark.parametrize("name", MODELS)
def test_pieces_change_nothing(name):
    model, _ = MODELS[name]
    x = torch.randn(9, 1, 1, 2, dtype=torch.float64)
    whole = bounds(model, x, 11, batch_size=1000)
    done = []
    for batch_size in (1, 4, 11, 50):
        rows = rows_of(x, 11, purpose="iwae")
        pieces = importance_weighted(model, rows, cpu(), batch_size, done.append)
        torch.testing.assert_close(pieces.bounds, whole.bounds, rtol=0, atol=1e-10)
        torch.testing.assert_close(pieces.effective, whole.effective, rtol=1e-9, atol=0)
    assert sum(done) == 4 * len(rows)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_extreme_weights_neither_overflow_nor_vanish(scale, batch_size):
    wild = SimpleNamespace(log_weight=lambda x: scale * randn_like(x.double().flatten(1)[:, :1]).squeeze(1))
    rows = rows_of(torch.zeros(8, 1, 1, 1), 13)
    drawn = gathered(rows, wild.log_weight).squeeze(2).numpy()
    assert drawn.max() > scale > -scale > drawn.min()
    weighted = importance_weighted(wild, rows, cpu(), batch_size, lambda _: None)
    expected = torch.tensor(logsumexp(drawn, 1) - math.log(13))
    torch.testing.assert_close(weighted.bounds, expected, rtol=1e-12, atol=1e-9)
    shares = torch.tensor(drawn).softmax(1)
    torch.testing.assert_close(weighted.effective, 1 / shares.square().sum(1), rtol=1e-9, atol=0)


def test_draws_are_weighed_in_double_precision():
    """Weights near e^1000 that differ by little keep their digits."""
    near = SimpleNamespace(log_weight=lambda x: 1000 + 1e-4 * randn_like(x.double().flatten(1)[:, :1]).squeeze(1))
    rows = rows_of(torch.zeros(4, 1, 1, 1), 50)
    drawn = gathered(rows, near.log_weight).squeeze(2)
    weighted = importance_weighted(near, rows, cpu(), 32, lambda _: None)
    torch.testing.assert_close(weighted.bounds, drawn.mean(1), rtol=0, atol=1e-8)
    torch.testing.assert_close(weighted.effective, torch.full((4,), 50.0).double(), rtol=1e-6, atol=0)
