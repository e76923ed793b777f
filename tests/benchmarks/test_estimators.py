"""The study measures what it says: its closed forms are the oracle's, its two estimators have one mean."""

import math

import pytest
import torch

from benchmarks import estimators
from benchmarks.estimators import printed_consistency_kl, single_step
from benchmarks.likelihood import loop
from benchmarks.small_models import linear_gaussian, linear_gaussian_elbo
from diffusion import cosine, linear
from tests.linear_gaussian import elbo_terms, optimal


@pytest.mark.parametrize("num_steps", [1, 2, 10, 100])
def test_closed_form_is_the_oracles_for_the_optimal_and_an_imperfect_predictor(num_steps):
    betas = cosine(num_steps).tolist()
    reconstruction, prior, matching = elbo_terms(betas, 0.25)
    assert linear_gaussian_elbo(betas, 0.25, 1.0) == pytest.approx(reconstruction - prior - matching, rel=1e-9)
    bar, factors = 1.0, []
    for beta in betas:
        bar *= 1 - beta
        # ε̂ = √ᾱ v̂ + √(1-ᾱ) x with v̂ = 0.8 of the optimal √ᾱ ε̂* - √(1-ᾱ) x̂_0*
        best = optimal(bar, 0.25)
        gain = math.sqrt(bar) * 0.25 / (bar * 0.25 + 1 - bar)
        factors.append(math.sqrt(bar) * 0.8 * (math.sqrt(bar) * best - math.sqrt(1 - bar) * gain) + math.sqrt(1 - bar))
    reconstruction, prior, matching = elbo_terms(betas, 0.25, factors)
    assert linear_gaussian_elbo(betas, 0.25, 0.8) == pytest.approx(reconstruction - prior - matching, rel=1e-9)


@pytest.mark.parametrize("num_steps", [2, 5, 50])
def test_both_forms_have_the_closed_forms_mean_and_the_consistency_form_is_noisier(num_steps):
    model = linear_gaussian(num_steps, 0.25, 0.8)
    x = 0.5 * torch.randn(100_000, 1, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        values = single_step(model, x)
        whole = loop(model, x[:20_000])
    exact = linear_gaussian_elbo(cosine(num_steps).tolist(), 0.25, 0.8)
    for estimate in (*values, whole):
        assert abs(estimate.mean() - exact) < 4 * estimate.std() / len(estimate) ** 0.5
    assert values[1].std() > 1.3 * values[0].std()


def test_the_noise_of_a_gradient_is_the_spread_of_gradients_one_by_one(monkeypatch):
    monkeypatch.setattr(estimators, "GRADIENTS", 40)
    model, x = linear_gaussian(5, 0.25, 0.8), 0.5 * torch.randn(64, 1, 1, 1, dtype=torch.float64)
    torch.manual_seed(0)
    found = estimators.measure(model, x, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        single_step(model, x)
    gradients = ([], [])
    for index in torch.randint(64, (40,)).tolist():
        for form, into in zip(single_step(model, x[index : index + 1]), gradients, strict=True):
            parts = torch.autograd.grad(form.sum(), list(model.parameters()), allow_unused=True, retain_graph=True)
            into.append(torch.cat([part.flatten() for part in parts if part is not None]))
    for noise, each in zip(found, gradients, strict=True):
        assert noise.gradient == pytest.approx(torch.stack(each).var(0).sum().sqrt().item(), rel=1e-9)


def test_the_printed_closed_form_is_far_from_the_bound():
    betas = linear(1000).tolist()
    assert printed_consistency_kl(betas, 1.0) == pytest.approx(-995.27, abs=0.005)
    assert linear_gaussian_elbo(betas, 1.0, 1.0) == pytest.approx(-1.9975, abs=5e-5)
