import math

import mpmath
import pytest
import torch
from scipy import stats

from losses import (
    Bernoulli,
    Categorical,
    DiscretizedGaussian,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Gaussian,
    from_unit,
    to_unit,
)

DISCRETIZED = {DiscretizedGaussian: stats.norm, DiscretizedLogistic: stats.logistic}


def all_levels(levels, params):
    """Pairs every parameter row with every level: (N, P) -> params (N·L, P, 1, 1), x (N·L, 1, 1, 1)."""
    x = torch.arange(levels).to(torch.uint8).repeat(len(params)).view(-1, 1, 1, 1)
    return params.repeat_interleave(levels, 0).view(len(x), -1, 1, 1).requires_grad_(), x


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
@pytest.mark.parametrize("likelihood", DISCRETIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_sum_to_one_with_finite_gradients(likelihood, levels, dtype):
    grid = torch.cartesian_prod(torch.linspace(-5, 5, 41, dtype=dtype), torch.linspace(-7, 3, 41, dtype=dtype))
    params, x = all_levels(levels, grid)
    log_prob = likelihood(levels).log_prob(params, x)
    total = log_prob.double().exp().view(len(grid), levels).sum(1)
    assert (total - 1).abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(log_prob.sum(), params)
    assert log_prob.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
@pytest.mark.parametrize("likelihood", DISCRETIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_output_however_wild_has_a_gradient_that_ends_a_run(likelihood, levels, dtype):
    means = torch.tensor([-1e6, -1e4, -50, -1, -0.5, 0, 0.9, 1, 5, 1e4, 1e6], dtype=dtype)
    wild = torch.tensor([-1e4, -800, -400, -100, -88, -60, -45, -35, 35, 45, 60, 88, 100, 400, 800, 1e4], dtype=dtype)
    params, x = all_levels(
        levels, torch.cartesian_prod(means, torch.cat([torch.linspace(-20, 20, 41, dtype=dtype), wild]).sort().values)
    )
    log_prob = likelihood(levels).log_prob(params, x)
    (gradient,) = torch.autograd.grad(log_prob.sum(), params)
    assert log_prob.isfinite().all()
    assert gradient.isfinite().all()
    near = (params[:, 0].abs() <= 5).flatten()
    assert log_prob[near].double().exp().view(-1, levels).sum(1).sub(1).abs().max() < 2e-6


@pytest.mark.parametrize("likelihood", DISCRETIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_narrowest_scales_put_all_on_the_level_of_the_mean(likelihood, dtype):
    mean = to_unit(torch.arange(256), 256, dtype)
    params = torch.stack([mean, torch.full_like(mean, -1e3)], 1).view(-1, 2, 1, 1)
    x = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1)
    assert torch.equal(likelihood(256).sample(params), x)
    assert torch.equal(likelihood(256).log_prob(params, x), torch.zeros(256, dtype=dtype))


@pytest.mark.parametrize(("mean", "log_scale", "level"), [(0.5, -7, 0), (0, -9, 255), (0.9, -11, 200), (-0.3, -8, 1)])
def test_a_gaussian_far_away_is_called_back_as_strongly_as_it_should_be(mean, log_scale, level):
    params = torch.tensor([float(mean), log_scale]).view(1, 2, 1, 1).requires_grad_()
    log_prob = DiscretizedGaussian(256).log_prob(params, torch.tensor(level, dtype=torch.uint8).view(1, 1, 1, 1))
    (gradient,) = torch.autograd.grad(log_prob.sum(), params)
    with mpmath.workdps(60):

        def exact(m, s):
            lower, upper = ((mpmath.mpf(2 * level - 255 + side) / 255 - m) * mpmath.exp(-s) for side in (-1, 1))
            if level == 255:
                return mpmath.log(mpmath.erfc(lower / mpmath.sqrt(2)) / 2)
            below = mpmath.mpf(0) if level == 0 else mpmath.erfc(-lower / mpmath.sqrt(2))
            return mpmath.log((mpmath.erfc(-upper / mpmath.sqrt(2)) - below) / 2)

        m, s = (mpmath.mpf(value) for value in params.flatten().tolist())
        right = [float(mpmath.diff(exact, (m, s), orders)) for orders in ((1, 0), (0, 1))]
    assert gradient.flatten().tolist() == pytest.approx(right, rel=2e-3)


@pytest.mark.parametrize("likelihood", DISCRETIZED)
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 3e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("log_scale", [-3.0, 0.0, 1.5, 3.0, 5.0, 10.0, 30.0, 60.0, 95.0, 200.0])
def test_wide_scales_keep_their_digits(likelihood, dtype, digits, log_scale):
    """Where a bin is a sliver of the density, the two cdfs agree in all digits that float32 has."""
    means = torch.tensor([-0.9, 0.01, 0.4, 3.0], dtype=dtype)
    params, x = all_levels(256, torch.stack([means, torch.full_like(means, log_scale)], 1))
    inner = (x.flatten() > 0) & (x.flatten() < 255)
    log_prob = likelihood(256).log_prob(params, x)
    (gradient,) = torch.autograd.grad(log_prob.sum(), params)
    with mpmath.workdps(400):
        s = mpmath.exp(log_scale)

        def cdf(z):
            return mpmath.ncdf(z) if likelihood is DiscretizedGaussian else 1 / (1 + mpmath.exp(-z))

        for index in inner.nonzero().flatten().tolist()[::37]:
            m, k = mpmath.mpf(params[index, 0].item()), x[index].item()
            lower, upper = ((mpmath.mpf(2 * k - 255 + side) / 255 - m) / s for side in (-1, 1))
            if lower + upper > 0:
                lower, upper = -upper, -lower
            right = float(mpmath.log(cdf(upper) - cdf(lower)))
            assert log_prob[index].item() == pytest.approx(right, rel=digits, abs=digits)
    # d/dm and d/dln s of w φ(z): z/s and z² - 1
    if log_scale >= 5:
        z = ((to_unit(x, 256, torch.float64) - params[:, :1].double()) / math.exp(log_scale)).flatten()[inner]
        assert (gradient[:, 1].double().flatten()[inner] + 1 - z.square()).abs().max() < 2e-3


def test_expected_levels_do_not_feel_mixed_precision():
    params = torch.randn(2, 256, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = Categorical(256).mean(params)
    assert torch.equal(mixed, Categorical(256).mean(params))


@pytest.mark.parametrize("likelihood", DISCRETIZED)
@pytest.mark.parametrize("levels", [17, 256])
def test_probabilities_are_cdf_differences(likelihood, levels):
    grid = torch.cartesian_prod(torch.linspace(-1.5, 1.5, 13), torch.linspace(-4, 1, 11)).double()
    params, x = all_levels(levels, grid)
    mine = likelihood(levels).log_prob(params, x).exp().view(len(grid), levels)
    edges = (torch.arange(levels + 1, dtype=torch.float64) - 0.5).mul(2 / (levels - 1)).sub(1).numpy()
    edges[0], edges[-1] = -math.inf, math.inf
    for row, (mean, log_scale) in zip(mine, grid.tolist(), strict=True):
        cdf = torch.from_numpy(DISCRETIZED[likelihood].cdf(edges, mean, math.exp(log_scale)))
        torch.testing.assert_close(row.detach(), cdf.diff(), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("components", [1, 2, 5])
def test_mixtures_are_weighted_sums_that_sum_to_one(levels, components):
    mixture, rows = DiscretizedLogisticMixture(levels, components), 40
    grid = torch.cat(
        [torch.randn(rows, components), 10 * torch.rand(rows, components) - 5, 10 * torch.rand(rows, components) - 7], 1
    )
    params, x = all_levels(levels, grid)
    log_prob = mixture.log_prob(params, x)
    assert (log_prob.double().exp().view(rows, levels).sum(1) - 1).abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(log_prob.sum(), params)
    assert gradient.isfinite().all()
    logits, mean, log_scale = params.detach().chunk(3, 1)
    places = torch.linspace(-1, 1, components + 2)[1:-1].view(1, -1, 1, 1)  # where the means start
    single = DiscretizedLogistic(levels)
    parts = [
        single.log_prob(torch.cat([mean[:, k : k + 1] + places[:, k : k + 1], log_scale[:, k : k + 1]], 1), x).exp()
        for k in range(components)
    ]
    expected = (logits.softmax(1)[..., 0, 0] * torch.stack(parts, 1)).sum(1)
    torch.testing.assert_close(log_prob.detach().exp(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_knowing_nothing_scores_log2_levels(levels):
    x = torch.randint(0, levels, (5, 3, 4, 4)).to(torch.uint8)
    bits = -Categorical(levels).log_prob(torch.zeros(5, levels * 3, 4, 4), x) / (48 * math.log(2))
    torch.testing.assert_close(bits, torch.full((5,), math.log2(levels)))


def test_bernoulli_equals_torch_and_categorical_equals_softmax():
    logits, x = torch.randn(6, 2, 3, 3), torch.randint(0, 2, (6, 2, 3, 3)).to(torch.uint8)
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(x.float()).flatten(1).sum(1)
    torch.testing.assert_close(Bernoulli().log_prob(logits, x), expected)
    logits = torch.randn(6, 5 * 2, 3, 3)  # parameter-major: (level, channel)
    expected = torch.distributions.Categorical(logits=logits.unflatten(1, (5, 2)).movedim(1, -1)).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(Categorical(5).log_prob(logits, x), expected)


@pytest.mark.parametrize(
    ("likelihood", "params"),
    [
        (Bernoulli(), torch.tensor([0.4])),
        (Categorical(5), torch.tensor([0.1, -1.0, 2.0, 0.5, 0.0])),
        (DiscretizedGaussian(17), torch.tensor([0.7, -1.2])),
        (DiscretizedLogistic(17), torch.tensor([-0.9, -1.5])),
        (DiscretizedLogisticMixture(17, 3), torch.tensor([0.3, 1.0, -0.5, -0.2, 0.1, 0.4, -2.0, -1.0, -3.0])),
    ],
)
def test_samples_follow_the_probabilities(likelihood, params):
    num = 40_000
    samples = likelihood.sample(params.view(1, -1, 1, 1).expand(num, -1, 1, 1)).flatten()
    assert samples.dtype == torch.uint8
    pairs, x = all_levels(likelihood.levels, params[None])
    expected = likelihood.log_prob(pairs, x).exp().detach()
    observed = torch.bincount(samples.long(), minlength=likelihood.levels) / num
    assert ((observed - expected).abs() < 5 * (expected * (1 - expected) / num).sqrt() + 1e-6).all()


def test_means():
    assert Categorical(5).mean(torch.tensor([0.0, 0, 50, 0, 0]).view(1, 5, 1, 1)).item() == 2
    assert DiscretizedLogistic(17).mean(torch.tensor([1.3, 0]).view(1, 2, 1, 1)).item() == 16
    assert Bernoulli().mean(torch.tensor([-0.1, 0.1]).view(2, 1, 1, 1)).flatten().tolist() == [0, 1]


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_units_are_inverse_and_end_at_one(levels):
    x = torch.arange(levels).to(torch.uint8)
    unit = to_unit(x, levels)
    assert unit[0] == -1
    assert unit[-1] == 1
    assert torch.equal(from_unit(unit, levels), x)
    assert from_unit(torch.tensor([-9.0, 9.0]), levels).tolist() == [0, levels - 1]


def test_bfloat16_parameters_are_scored_in_float32():
    params, x = torch.randn(4, 2, 8, 8).bfloat16(), torch.randint(0, 17, (4, 1, 8, 8)).to(torch.uint8)
    for likelihood in (DiscretizedGaussian(17), DiscretizedLogistic(17)):
        torch.testing.assert_close(likelihood.log_prob(params, x), likelihood.log_prob(params.float(), x))


@pytest.mark.parametrize("levels", [17, 256, 1])
def test_bernoulli_refuses_grey_levels(levels):
    with pytest.raises(ValueError, match="2 levels"):
        Bernoulli(levels)


@pytest.mark.parametrize("levels", [1, 257, 2.0, None])
def test_other_levels_are_refused(levels):
    with pytest.raises(ValueError, match="model/likelihood=gaussian" if levels is None else "from 2 to 256"):
        DiscretizedLogistic(levels)


def test_a_density_refuses_levels_and_equals_the_normal():
    with pytest.raises(ValueError, match="density"):
        Gaussian(17)
    mean, log_std, x = torch.randn(3, 2, 1, 1), torch.randn(3, 2, 1, 1), torch.randn(3, 2, 1, 1)
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(Gaussian().log_prob(torch.cat([mean, log_std], 1), x), expected)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Categorical(17), DiscretizedLogisticMixture(17, 3)])
def test_parameters_of_other_pixels_are_refused(likelihood):
    x, num = torch.zeros(4, 2, 3, 3, dtype=torch.uint8), likelihood.params_per_channel
    for shape in ((1, 2 * num, 3, 3), (4, 2 * num, 1, 1), (4, num, 3, 3)):
        with pytest.raises(ValueError, match="do not belong to images"):
            likelihood.log_prob(torch.zeros(shape), x)


@pytest.mark.parametrize("components", [0, -1, 1.5, True])
def test_impossible_numbers_of_components_are_refused(components):
    with pytest.raises(ValueError, match=r"likelihood\.components="):
        DiscretizedLogisticMixture(17, components)


def test_means_are_the_nearest_level_and_inside_the_range():
    assert Categorical(5).mean(torch.tensor([0.0, 0, 0, 0.4, 0.6]).log().view(1, 5, 1, 1)).item() == 4
    assert Bernoulli().mean(torch.zeros(1, 1, 1, 1)).item() == 0
    assert Gaussian().mean(torch.tensor([1.5, -2.0]).view(1, 2, 1, 1)).item() == 1.5
    outside = torch.tensor([math.log(0.75), math.log(0.25), 9.0, -0.5, 0.0, 0.0])  # means 9 - 1/3 -> 1, -0.5 + 1/3
    assert DiscretizedLogisticMixture(17, 2).mean(outside.view(1, 6, 1, 1)).item() == round((0.75 - 0.25 / 6 + 1) * 8)
