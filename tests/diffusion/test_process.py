import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

import diffusion
from diffusion import X0, Epsilon, GaussianDiffusion, Lattice, large, small
from losses import Categorical, DiagGaussian, DiscretizedGaussian, Gaussian, to_unit
from tests.diffusion.test_schedules import NAMES, betas_of


def draw(process, batch=6, shape=(1, 4, 4), dtype=torch.float64, first=2):
    x0 = torch.rand(batch, *shape, dtype=dtype) * 2 - 1
    t = torch.randint(first, process.num_steps + 1, (batch,))
    noise = torch.randn_like(x0)
    marginal = process.marginal(x0, t)
    return x0, t, noise, marginal.mean + marginal.log_std.exp() * noise


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_steps", [2, 10, 100, 1000])
def test_step_kl_is_the_kl_and_the_weighted_errors(name, num_steps):
    process = GaussianDiffusion(betas_of(name, num_steps))
    x0, t, noise, x_t = draw(process)
    prediction = noise + 0.3 * torch.randn_like(noise)
    value = process.step_kl(x0, x_t, t, prediction)
    q, p = process.posterior(x0, x_t, t), process.reverse(prediction, x_t, t)
    oracle = kl_divergence(Normal(q.mean, q.log_std.exp()), Normal(p.mean, p.log_std.exp())).flatten(1).sum(1)
    torch.testing.assert_close(value, oracle, rtol=1e-6, atol=1e-9)

    betas, bar = process.betas[t], process.alpha_bar
    weight = betas / (2 * (1 - betas) * (1 - bar[t - 1]))
    torch.testing.assert_close(value, weight * (noise - prediction).square().flatten(1).sum(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(process.epsilon_weight[t], weight, rtol=1e-7, atol=0)
    x0_hat = Epsilon().x0(prediction, x_t, t, process)
    torch.testing.assert_close(value, process.x0_weight[t] * (x0 - x0_hat).square().flatten(1).sum(1), rtol=1e-6, atol=0)
    root, sigma = bar[t].sqrt().view(-1, 1, 1, 1), (1 - bar[t]).sqrt().view(-1, 1, 1, 1)
    v_error = (root * noise - sigma * x0) - (root * prediction - sigma * x0_hat)
    torch.testing.assert_close(value, process.v_weight[t] * v_error.square().flatten(1).sum(1), rtol=1e-6, atol=0)


def test_weights_are_finite_where_nothing_of_the_signal_is_left():
    process = GaussianDiffusion(diffusion.constant(1000, beta=0.9))
    assert process.alpha_bar[-1] == 0
    for weight in (process.epsilon_weight, process.x0_weight, process.v_weight):
        assert weight.isfinite().all()
        assert (weight >= 0).all()
    assert process.epsilon_weight[1000].item() == pytest.approx(0.9 / (2 * 0.1))  # β_t/(2 α_t (1 - ᾱ_{t-1}))


@pytest.mark.parametrize("name", NAMES)
def test_posterior_is_bayes_rule(name):
    process = GaussianDiffusion(betas_of(name, 50))
    x0, t, _, x_t = draw(process)
    z = torch.randn_like(x0)
    # ln q(z | x_t, x_0) = ln q(x_t | z) + ln q(z | x_0) - ln q(x_t | x_0), for any z
    bayes = process.step(z, t).log_prob(x_t) + process.marginal(x0, t - 1).log_prob(z) - process.marginal(x0, t).log_prob(x_t)
    torch.testing.assert_close(process.posterior(x0, x_t, t).log_prob(z), bayes, rtol=1e-6, atol=1e-6)


def test_marginal_composes_the_steps():
    process = GaussianDiffusion(diffusion.cosine(30))
    x = torch.full((100_000, 1), 0.7, dtype=torch.float64)
    chain = x
    for step in range(1, 21):
        chain = process.step(chain, torch.full((len(x),), step)).sample()
    marginal = process.marginal(x[:1], torch.tensor([20]))
    assert chain.mean().item() == pytest.approx(marginal.mean.item(), abs=0.01)
    assert chain.std().item() == pytest.approx(marginal.log_std.exp().item(), abs=0.01)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip", [False, True])
def test_reverse_equals_diffusers(kind, clip):
    betas = diffusion.linear(1000)
    process = GaussianDiffusion(betas, {"fixed_small": small, "fixed_large": large}[kind])
    peer = DDPMScheduler(trained_betas=betas.numpy(), variance_type=kind, clip_sample=clip)
    peer.betas, peer.alphas, peer.alphas_cumprod = betas, 1 - betas, (1 - betas).cumprod(0)  # theirs are float32
    x_t, prediction = torch.randn(3, 1, 5, 5, dtype=torch.float64), torch.randn(3, 1, 5, 5, dtype=torch.float64)
    for step in (2, 3, 17, 500, 1000):
        t = torch.full((3,), step)
        mine = process.reverse(prediction, x_t, t, clip=clip)
        torch.manual_seed(7)
        theirs = peer.step(prediction, step - 1, x_t).prev_sample
        torch.manual_seed(7)
        noise = torch.randn(x_t.shape, dtype=x_t.dtype)
        torch.testing.assert_close(mine.mean + mine.log_std.exp() * noise, theirs, rtol=1e-7, atol=1e-7)


def test_variances_at_the_first_step():
    betas = diffusion.cosine(10)
    bar = (1 - betas).cumprod(0)
    tilde_2 = betas[1] * (1 - bar[0]) / (1 - bar[1])
    torch.testing.assert_close(small(betas)[:2], tilde_2.expand(2))
    torch.testing.assert_close(large(betas), torch.cat([tilde_2[None], betas[1:]]))
    torch.testing.assert_close(small(betas[:1]), betas[:1])


def test_at_t_1_the_posterior_is_the_image_itself():
    process = GaussianDiffusion(diffusion.cosine(10))
    x0, _, _, x_1 = draw(process)
    posterior = process.posterior(x0, x_1, torch.ones(6, dtype=torch.int64))
    torch.testing.assert_close(posterior.mean, x0)
    assert (posterior.log_std == -math.inf).all()


def test_t_scales_images_and_not_columns():
    process = GaussianDiffusion(diffusion.cosine(10))
    x0, t = torch.ones(4, 1, 4, 4, dtype=torch.float64), torch.tensor([1, 4, 7, 10])
    mean = process.marginal(x0, t).mean
    for image, step in zip(mean, t, strict=True):
        torch.testing.assert_close(image, process.alpha_bar[step].sqrt().expand(1, 4, 4))


def test_other_shapes_and_steps_are_refused_and_not_broadcast():
    process = GaussianDiffusion(diffusion.cosine(10))
    grey, colours, t = torch.zeros(4, 1, 2, 2), torch.zeros(4, 3, 2, 2), torch.tensor([1, 4, 7, 10])
    for refused, words in (
        (lambda: process.posterior(grey, colours, t), "not of the same images"),
        (lambda: process.step_kl(grey, colours, t, colours), "not of the same images"),
        (lambda: process.marginal(colours[:1], t), "not one step for each of the 1 rows"),
        (lambda: process.marginal(colours, -1), "t=-1: steps are 1..10"),
        (lambda: process.marginal(colours, 11), "t=11: steps are 1..10"),
        (lambda: diffusion.Epsilon().x0(colours, colours, -1, process), "t=-1: steps are 1..10"),
    ):
        with pytest.raises(ValueError, match=words):
            refused()


@pytest.mark.parametrize("convert", ["half", "bfloat16", "float"])
def test_coefficients_are_never_narrowed(convert):
    process = getattr(GaussianDiffusion(diffusion.linear(1000)), convert)()
    assert all(buffer.dtype == torch.float64 for buffer in process.buffers())
    assert not process.state_dict()
    assert process.marginal(torch.zeros(2, 3), torch.tensor([1, 5])).mean.dtype == torch.float32


@pytest.mark.parametrize("betas", [[0.1, 1.0], [0.0, 0.1], [0.1, -0.1], [0.1, math.nan], [], [[0.1]]])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError, match="beta"):
        GaussianDiffusion(torch.tensor(betas))


@pytest.mark.parametrize("name", ["linear", "cosine", "log_snr_linear"])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_lattice_is_bayes_rule_over_the_levels(name, levels):
    process = GaussianDiffusion(betas_of(name, 100))
    x = torch.randint(0, levels, (5, 2, 3, 3))
    t = torch.tensor([1, 2, 20, 60, 100])
    x_t = process.marginal(to_unit(x, levels).double(), t).sample()
    output = torch.randn(5, levels * 2, 3, 3, dtype=torch.float64)
    prior = output.unflatten(1, (levels, 2)).log_softmax(1)
    grid = to_unit(torch.arange(levels), levels).double().view(1, -1, 1, 1, 1)
    mean, std = process.alpha_bar[t].sqrt().view(-1, 1, 1, 1, 1) * grid, (1 - process.alpha_bar[t]).sqrt().view(-1, 1, 1, 1, 1)
    posterior = (prior + Normal(mean, std).log_prob(x_t.unsqueeze(1))).softmax(1)
    lattice = Lattice(levels)
    torch.testing.assert_close(lattice.x0(output, x_t, t, process), (posterior * grid).sum(1), rtol=1e-6, atol=1e-9)
    first = t == 1
    params = lattice.likelihood_params(output[first], x_t[first], process, clip=False)
    expected = posterior[first].log().gather(1, x[first].unsqueeze(1)).flatten(1).sum(1)
    torch.testing.assert_close(Categorical(levels).log_prob(params, x[first].to(torch.uint8)), expected, rtol=1e-6, atol=1e-6)


def test_lattice_keeps_its_digits_in_float32():
    process = GaussianDiffusion(diffusion.linear(1000))  # SNR_1 = 1e4
    _x0, t, _, x_t = draw(process, first=1)
    output = torch.randn(6, 256, 4, 4, dtype=torch.float64)
    exact = Lattice(256).x0(output, x_t, t, process)
    torch.testing.assert_close(Lattice(256).x0(output.float(), x_t.float(), t, process).double(), exact, rtol=0, atol=1e-4)


def test_parameterizations_of_one_prediction_agree():
    process = GaussianDiffusion(diffusion.cosine(20))
    _, t, noise, x_t = draw(process)
    x0_hat = Epsilon().x0(noise, x_t, t, process)
    torch.testing.assert_close(X0().epsilon(x0_hat, x_t, t, process), noise)
    assert isinstance(Epsilon().likelihood(17), DiscretizedGaussian)
    assert isinstance(X0().likelihood(None), Gaussian)


@pytest.mark.parametrize("parameterization", [Epsilon(), X0(), Lattice(17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t", [1, 7, 20])
def test_one_t_for_all_is_the_same_t_for_each(parameterization, dtype, t):
    process = GaussianDiffusion(diffusion.cosine(20))
    x_t = torch.randn(3, 2, 4, 3, dtype=dtype)
    output = torch.randn(3, 2 * parameterization.outputs_per_channel, 4, 3, dtype=dtype)
    each = torch.full((3,), t)
    for function in (parameterization.x0, parameterization.epsilon):
        expected = function(output, x_t, each, process)
        assert expected.dtype == dtype
        torch.testing.assert_close(function(output, x_t, t, process), expected)


def test_lattice_refuses_other_levels():
    with pytest.raises(ValueError, match="continuous"):
        Lattice(None)
    with pytest.raises(ValueError, match="17 levels"):
        Lattice(17).likelihood(256)


def test_first_step_likelihood_is_the_reverse_step():
    process = GaussianDiffusion(diffusion.cosine(20))
    x_1, output = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    reverse = process.reverse(output, x_1, torch.ones(3, dtype=torch.int64))
    params = Epsilon().likelihood_params(output, x_1, process, clip=False)
    x = torch.randn(3, 1, 2, 2)
    torch.testing.assert_close(Gaussian().log_prob(params, x), DiagGaussian(reverse.mean, reverse.log_std).log_prob(x))


@pytest.mark.parametrize("parameterization", [X0(), Epsilon()])
def test_a_narrow_output_is_widened_before_it_meets_a_coefficient(parameterization):
    process, t = GaussianDiffusion(diffusion.cosine(20)), torch.tensor([2, 9, 20])
    x_t, output = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4).bfloat16()
    assert parameterization.epsilon(output, x_t, t, process).dtype == torch.float32
    narrow, wide = (process.reverse(given, x_t, t, parameterization).mean for given in (output, output.float()))
    torch.testing.assert_close(narrow, wide, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameterization", [X0(), Epsilon()])
def test_narrow_images_are_widened_before_they_meet_a_coefficient(parameterization, dtype):
    process = GaussianDiffusion(diffusion.log_snr_linear(100))
    t = torch.tensor([2, 20, 100])
    x0, x_t, output = (torch.randn(3, 2, 4, 4).to(dtype) for _ in range(3))

    def numbers(x0, x_t):
        pairs = (process.marginal(x0, t), process.step(x0, t), process.posterior(x0, x_t, t), process.marginal(x0, 100))
        kls = process.step_kl(x0, x_t, t, output, parameterization), process.prior_kl(x0)
        return [*kls, *(value for pair in pairs for value in (pair.mean, pair.log_std))]

    for narrow, wide in zip(numbers(x0, x_t), numbers(x0.float(), x_t.float()), strict=True):
        torch.testing.assert_close(narrow, wide, rtol=0, atol=0)
