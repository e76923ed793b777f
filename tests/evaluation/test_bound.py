"""Both forms of DDPM's bound, in expectation and to the last digit, on linear-Gaussian data.

Every term is quadratic in the Gaussians that are drawn, so a few points integrate it exactly.
"""

import itertools
import math

import pytest
import torch

from diffusion.step_profile import uniform_proposal
from losses import draws
from losses.draws import Own, own_generators
from tests.diffusion.test_schedules import NAMES, betas_of
from tests.lightning_modules.test_ddpm import linear_model
from tests.linear_gaussian import elbo_terms, optimal

SHAPE, DIMS = (1, 2, 2), 4  # more than one dimension, so that a mean over dimensions is no sum
LENGTHS = [1, 2, 3, 5, 10, 50]
TABLE = [
    ("linear", 50, 0.25, 1.683457, 0.000001, -2.719203),
    ("linear", 1000, 1.0, 3.072529, 0.000020, -1.997533),
    ("cosine", 2, 0.25, -0.776864, 0.000062, -0.898809),
    ("cosine", 1000, 0.25, 3.500878, 0.000000, -1.255785),
]


def imperfect(num_steps):
    return [0.3 + 0.5 * t / num_steps for t in range(num_steps)]


def total(terms):
    return terms[0] - terms[1] - terms[2]


def means(elbo):
    return [term.mean().item() / DIMS for term in (elbo.reconstruction, elbo.prior, elbo.matching)]


def images(values):
    return values.double().view(-1, 1, 1, 1).expand(-1, *SHAPE)


def uneven(num_steps, multiple):
    """p_t in multiples of 1/M, M itself a multiple of ``multiple``: (p, M)."""
    counts = torch.tensor([0, 0, *(1 + 7 * t % 5 for t in range(2, num_steps + 1))])
    counts[-1] += -counts.sum() % multiple
    num = max(multiple, int(counts.sum()))  # T = 1 draws no steps
    return counts.double() / num, num


def exact_importance(model, s2, calls, monkeypatch, grid=None, control=None):
    """The expected terms of elbo(x, calls): every cell of the proposal's grid with each sign of x_0 and of the noise."""
    proposal, num = grid or uneven(model.num_steps, calls - 1)
    each = num // (calls - 1)  # the draws of one row lie 1/(calls - 1) apart: together the rows' draws are the grid
    cells = (torch.arange(each).double() + 0.5) / each
    x, noise, cell = torch.cartesian_prod(*2 * [torch.tensor([1.0, -1.0]).double()], cells).T

    def signs(like):
        return images(noise).repeat_interleave(len(like) // len(x), 0)

    with monkeypatch.context() as patch, own_generators(Own([], lambda: cell)), torch.no_grad():
        patch.setattr("losses.gaussian.randn_like", signs)
        return means(model.elbo(math.sqrt(s2) * images(x), calls, proposal, control))


def exact_chain(model, s2, function, monkeypatch):
    """``function`` of x_0 at the 2n points ±√n e_i of (x_0, ε_1, ..., ε_T), whose mean integrates a quadratic exactly."""
    num = model.num_steps + 1
    points = torch.cat([torch.eye(num), -torch.eye(num)]).double() * math.sqrt(num)
    columns = itertools.count(1)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr("losses.gaussian.randn_like", lambda _: images(points[:, next(columns)]))
        value = function(math.sqrt(s2) * images(points[:, 0]))
    assert next(columns) == num, "the chain draws its noise once for each step"
    return value


def close(value, expected):
    # next to the largest of the terms that cancel
    return abs(value - expected) < 1e-5 * max(1.0, abs(expected))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_steps", LENGTHS)
def test_both_forms_are_exact_with_optimal_and_imperfect_predictors(name, num_steps, monkeypatch):
    betas = betas_of(name, num_steps)
    for s2, factors in itertools.product((0.25, 2.0), (None, imperfect(num_steps))):
        expected = elbo_terms(betas.tolist(), s2, factors)
        model = linear_model(betas, s2, factors, shape=SHAPE)
        assert exact_importance(model, s2, 2, monkeypatch) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        chain = means(exact_chain(model, s2, model.three_variable_elbo, monkeypatch))
        weight = exact_chain(model, s2, model.log_weight, monkeypatch).mean().item() / DIMS
        assert chain[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-5)
        assert chain[1] == pytest.approx(consistency_prior(betas.tolist(), s2), rel=1e-5, abs=1e-5)
        assert close(total(chain), total(expected))
        assert close(weight, total(expected))


@pytest.mark.parametrize("calls", [2, 3, 5, 9])
@pytest.mark.parametrize("even", [True, False])
def test_any_number_of_calls_and_any_proposal_have_one_mean(calls, even, monkeypatch):
    num_steps, s2 = 49 if even else 50, 0.25
    betas, factors = betas_of("cosine", num_steps), imperfect(num_steps)
    model = linear_model(betas, s2, factors, shape=SHAPE)
    grid = (uniform_proposal(num_steps), num_steps - 1) if even else uneven(num_steps, calls - 1)
    terms = exact_importance(model, s2, calls, monkeypatch, grid)
    assert terms == pytest.approx(elbo_terms(betas.tolist(), s2, factors), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("name", "num_steps", "s2", "reconstruction", "prior", "elbo"), TABLE)
def test_the_table_of_exact_values_by_both_forms(name, num_steps, s2, reconstruction, prior, elbo, monkeypatch):
    model = linear_model(betas_of(name, num_steps), s2, shape=SHAPE)
    terms = exact_importance(model, s2, 2, monkeypatch)
    assert terms[:2] == pytest.approx([reconstruction, prior], abs=1e-5)
    assert total(terms) == pytest.approx(elbo, abs=1e-5)
    if num_steps < 1000 or name == "linear":  # one long chain is enough
        chain = means(exact_chain(model, s2, model.three_variable_elbo, monkeypatch))
        assert chain[0] == pytest.approx(reconstruction, abs=1e-5)
        assert total(chain) == pytest.approx(elbo, abs=1e-5)


def test_the_kl_that_tutorials_put_for_the_consistency_term_is_another_number(monkeypatch):
    """It treats x_t as drawn from q(x_t|x_{t-1}) though x_{t+1} is given: -995.27 nats where the bound is -1.9975."""
    betas = betas_of("linear", 1000)
    wrong = kl_for_consistency(betas.tolist(), 1.0)
    assert wrong == pytest.approx(-995.27, abs=0.01)
    short = betas_of("cosine", 20)
    model = linear_model(short, 1.0, shape=SHAPE)
    right = total(elbo_terms(short.tolist(), 1.0))
    for value in (
        total(exact_importance(model, 1.0, 2, monkeypatch)),
        total(means(exact_chain(model, 1.0, model.three_variable_elbo, monkeypatch))),
    ):
        assert value == pytest.approx(right, abs=1e-5)
        assert abs(value - kl_for_consistency(short.tolist(), 1.0)) > 5
    long = linear_model(betas, 1.0, shape=SHAPE)
    assert abs(total(exact_importance(long, 1.0, 2, monkeypatch)) - wrong) > 900
    with torch.no_grad():
        drawn = long.three_variable_elbo(draws.randn_like(images(torch.zeros(64)))).value / DIMS
    assert abs(drawn.mean().item() - wrong) > 900


def consistency_prior(betas, s2):
    """E KL(q(x_T|x_{T-1}) ‖ N(0, 1)) per dimension, in plain Python."""
    before = math.prod(1 - beta for beta in betas[:-1])
    last = betas[-1]
    return 0.5 * ((1 - last) * (before * s2 + 1 - before) + last - 1 - math.log(last))


def kl_for_consistency(betas, s2):
    """The bound as printed with Σ_t E KL(q(x_t|x_{t-1}) ‖ p(x_t|x_{t+1})), the optimal predictor, in plain Python."""
    bars = [1.0, *itertools.accumulate((1 - beta for beta in betas), lambda a, b: a * b)]
    wrong = 0.0
    for t in range(1, len(betas)):
        beta, above, noise = betas[t - 1], betas[t], 1 - bars[t + 1]
        sigma2 = above * (1 - bars[t]) / noise
        slope = (1 - above * optimal(bars[t + 1], s2) / math.sqrt(noise)) / math.sqrt(1 - above)
        before = bars[t - 1] * s2 + 1 - bars[t - 1]  # E x_{t-1}²
        root = math.sqrt((1 - beta) * (1 - above))  # x_{t+1} = root · x_{t-1} + noise
        after = bars[t + 1] * s2 + noise
        square = (1 - beta) * before - 2 * math.sqrt(1 - beta) * slope * root * before + slope**2 * after
        wrong += 0.5 * math.log(sigma2 / beta) + (beta + square) / (2 * sigma2) - 0.5
    return elbo_terms(betas, s2)[0] - consistency_prior(betas, s2) - wrong
