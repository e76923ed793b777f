import math
from functools import partial

import pytest
import torch
from torch import nn

import diffusion
from diffusion import X0, Epsilon, GaussianDiffusion, Lattice
from diffusion.control import DENOISERS, Control
from diffusion.step_profile import proposal_from
from lightning_modules import DDPMLightningModule
from losses import DiagGaussian, Gaussian, kl
from tests.diffusion.test_schedules import NAMES, betas_of
from tests.linear_gaussian import elbo_terms


class Linear(nn.Module):
    """ε_θ(x, t) = factors[t - 1] · x."""

    def __init__(self, factors):
        super().__init__()
        self.factors = nn.Parameter(torch.as_tensor(factors, dtype=torch.float64))

    def forward(self, x, t):
        return self.factors[t - 1].to(x.dtype).view(-1, *[1] * (x.ndim - 1)) * x


class Tiny(nn.Module):
    """A small network with a time: (B, C, H, W), (B,) -> (B, P·C, H, W)."""

    def __init__(self, channels, outputs):
        super().__init__()
        self.conv, self.time = nn.Conv2d(channels, outputs * channels, 3, padding=1), nn.Embedding(2000, outputs * channels)

    def forward(self, x, t):
        return self.conv(x) + self.time(t)[:, :, None, None]


def linear_model(betas, s2, factors=None, shape=(1, 1, 1), **settings):
    bar = GaussianDiffusion(betas).alpha_bar[1:]
    factors = (1 - bar).sqrt() / (bar * s2 + 1 - bar) if factors is None else factors
    return DDPMLightningModule(
        Linear(factors), lambda T: betas, len(betas), Epsilon(), image_shape=shape, levels=None, **settings
    ).double()


def exact_terms(model, s2, monkeypatch):
    """The expected terms: every term is quadratic in (x_0, ε), so x_0 = ±s and ε = ±1 integrate it exactly."""
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    x = math.sqrt(s2) * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).view(4, 1, 1, 1)

    def signs(like):
        return noise.repeat_interleave(len(like) // 4).view(-1, 1, 1, 1)

    monkeypatch.setattr("losses.gaussian.randn_like", signs)
    elbo = model.elbo(x)
    return [term.mean().item() for term in (elbo.reconstruction, elbo.prior, elbo.matching, elbo.value)]


@pytest.mark.parametrize(
    ("name", "num_steps", "s2", "reconstruction", "prior", "elbo"),
    [
        ("linear", 50, 0.25, 1.683457, 0.000001, -2.719203),
        ("linear", 1000, 1.0, 3.072529, 0.000020, -1.997533),
        ("cosine", 2, 0.25, -0.776864, 0.000062, -0.898809),
        ("cosine", 1000, 0.25, 3.500878, 0.000000, -1.255785),
    ],
)
def test_the_table_of_exact_values(name, num_steps, s2, reconstruction, prior, elbo, monkeypatch):
    terms = exact_terms(linear_model(betas_of(name, num_steps), s2), s2, monkeypatch)
    assert terms[0] == pytest.approx(reconstruction, abs=1e-5)
    assert terms[1] == pytest.approx(prior, abs=1e-5)
    assert terms[3] == pytest.approx(elbo, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 100])
@pytest.mark.parametrize("s2", [0.25, 1.0, 2.0])
def test_linear_gaussian_data_is_scored_exactly_with_imperfect_predictors_too(name, num_steps, s2, monkeypatch):
    betas = betas_of(name, num_steps)
    for factors in (None, [0.3 + 0.5 * t / num_steps for t in range(num_steps)]):
        expected = elbo_terms(betas.tolist(), s2, factors)
        terms = exact_terms(linear_model(betas, s2, factors), s2, monkeypatch)
        assert terms[:3] == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_the_bound_is_below_the_likelihood():
    betas = diffusion.linear(50)
    log_p = -0.740356
    assert sum(elbo_terms(betas.tolist(), 0.25)[:1]) - sum(elbo_terms(betas.tolist(), 0.25)[1:]) < log_p


@pytest.mark.parametrize("parameterization", [Epsilon(), X0(), Lattice(17)])
def test_full_is_a_plain_loop_over_steps(parameterization):
    """An independent sum: one step at a time, with the same draws."""
    model = ddpm(parameterization, num_steps=12).double()
    x = torch.randint(0, 17, (300, 1, 4, 4)).to(torch.uint8)  # more rows than share a call: one t a call, in order
    torch.manual_seed(3)
    elbo = model.elbo(x)
    torch.manual_seed(3)
    process, x0 = model.process, model.to_unit(x)
    total = torch.zeros(300, dtype=torch.float64)
    for step in range(2, 13):
        t = torch.full((300,), step)
        x_t = process.marginal(x0, t).sample()
        output = model.network(x_t, t)
        total += kl(process.posterior(x0, x_t, t), process.reverse(output, x_t, t, parameterization, clip=True))
    torch.testing.assert_close(elbo.matching.double(), total, rtol=1e-5, atol=1e-5)
    last = torch.full((300,), 12)
    torch.testing.assert_close(elbo.prior, kl(process.marginal(x0, last), DiagGaussian.standard(x0)))


def ddpm(parameterization, num_steps, channels=1, size=4, levels=17, schedule=diffusion.cosine, **settings):
    network = Tiny(channels, parameterization.outputs_per_channel)
    return DDPMLightningModule(
        network, schedule, num_steps, parameterization, image_shape=(channels, size, size), levels=levels, **settings
    )


@pytest.mark.parametrize("parameterization", [Epsilon(), X0(), Lattice(17)])
@pytest.mark.parametrize("calls", [2, 5, 29])
def test_few_calls_and_training_draws_are_unbiased(parameterization, calls):
    model = ddpm(parameterization, num_steps=30)
    model.clip = False  # as the objective has it
    x = torch.randint(0, 17, (1, 1, 4, 4)).to(torch.uint8).expand(2000, -1, -1, -1)
    with torch.no_grad():
        exact = torch.cat([model.elbo(x[:500]).value for _ in range(8)]).double()
        for _ in range(20):
            model.objective(x[:200])
        model.step_profile.refresh(OneRank())
        few = torch.cat([model.elbo(x, calls).value for _ in range(5)]).double()
        drawn = torch.cat([model.objective(x)[1].value for _ in range(20)]).double()
    for estimate in (few, drawn):
        error = math.hypot(estimate.std() / len(estimate) ** 0.5, exact.std() / len(exact) ** 0.5)
        assert abs(estimate.mean() - exact.mean()) < 4 * error


class OneRank:
    is_global_zero = True

    def reduce(self, tensor, reduce_op):
        return tensor


def test_importance_needs_fewer_calls_than_uniform_steps():
    model = ddpm(Epsilon(), num_steps=200, schedule=diffusion.linear)
    x = torch.randint(0, 17, (400, 1, 4, 4)).to(torch.uint8)
    with torch.no_grad():
        uniform = model.elbo(x, 4).matching.var()
        for _ in range(30):
            model.objective(x)
        model.step_profile.refresh(OneRank())
        assert model.elbo(x, 4).matching.var() < uniform / 5


@pytest.mark.parametrize("parameterization", [Epsilon(), X0(), Lattice(17)])
def test_the_proposal_follows_the_clamped_chain_that_validation_scores(parameterization):
    """Near T a barely trained ε̂ is far outside [-1, 1]: training's KLs would put nearly all draws on steps that cost little."""
    model = ddpm(parameterization, num_steps=20, schedule=diffusion.cosine)
    x = torch.randint(0, 17, (400, 1, 4, 4)).to(torch.uint8)
    with torch.no_grad():
        for _ in range(60):
            model.objective(x)
        model.step_profile.refresh(OneRank())
        kls = model.latent_kls(x.repeat(4, 1, 1, 1))[:-1]
    due = proposal_from(kls.square().mean(1).sqrt())
    torch.testing.assert_close(model.step_profile.proposal[2:], due[2:], rtol=0.2, atol=0.004)


@pytest.mark.parametrize("parameterization", [Epsilon(), X0(), Lattice(17)])
def test_training_reports_the_bound_of_the_chain_that_samples(parameterization):
    model = ddpm(parameterization, num_steps=20, schedule=diffusion.cosine)
    x = torch.randint(0, 17, (400, 1, 4, 4)).to(torch.uint8)
    with torch.no_grad():
        seen = torch.stack([model.objective(x)[1].value.mean() for _ in range(60)])
        due = model.elbo(x.repeat(4, 1, 1, 1)).value.mean()
    assert abs(seen.mean() - due) < 4.5 * seen.std() / 60**0.5 + 0.01 * abs(due)


def test_only_training_is_recorded():
    model = ddpm(X0(), num_steps=10).eval()
    model.objective(torch.zeros(4, 1, 4, 4, dtype=torch.uint8))
    assert model.step_profile.recorded()["sums"] is None


def test_elbo_weighting_minimises_the_bound_and_simple_the_noise_error():
    x = torch.randint(0, 17, (64, 1, 4, 4)).to(torch.uint8)
    for parameterization in (X0(), Lattice(17)):
        model = ddpm(parameterization, num_steps=10)
        model.clip = False  # as the loss has it
        loss, elbo = model.objective(x)
        torch.testing.assert_close(loss, -elbo.value.mean() / 16)
    model = ddpm(Epsilon(), num_steps=10, weighting=diffusion.simple)
    nn.init.zeros_(model.network.conv.weight)
    nn.init.zeros_(model.network.conv.bias)
    nn.init.zeros_(model.network.time.weight)
    assert model.objective(x.repeat(20, 1, 1, 1))[0].item() == pytest.approx(1, abs=0.03)  # E ε², a mean over dimensions


@pytest.mark.parametrize(("weighting", "asked"), [(diffusion.simple, 1), (diffusion.weightings.elbo, 0)])
def test_the_noise_is_worked_out_for_a_loss_that_reads_it(weighting, asked, monkeypatch):
    calls, usual = [], Lattice.epsilon
    monkeypatch.setattr(Lattice, "epsilon", lambda self, *arguments: (calls.append(1), usual(self, *arguments))[1])
    ddpm(Lattice(17), num_steps=10, weighting=weighting).objective(torch.zeros(4, 1, 4, 4, dtype=torch.uint8))
    assert len(calls) == asked


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("parameterization", [Epsilon(), X0(), Lattice(17)])
@pytest.mark.parametrize("variance", [diffusion.small, diffusion.large])
def test_short_chains_train_and_sample(num_steps, parameterization, variance):
    model = ddpm(parameterization, num_steps, channels=3, variance=variance)
    x = torch.randint(0, 17, (8, 3, 4, 4)).to(torch.uint8)
    loss, elbo = model.objective(x)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert elbo.value.isfinite().all()
    samples = model.sample(5)
    assert samples.dtype == torch.uint8
    assert samples.shape == (5, 3, 4, 4)
    assert samples.max() <= 16
    kls = model.latent_kls(x)
    assert kls.shape == (num_steps, 8)
    assert (kls >= 0).all()


def test_the_chain_samples_the_data_that_its_predictor_knows():
    s2 = 0.25
    model = linear_model(diffusion.cosine(200), s2)
    samples = model.sample(20_000)
    assert samples.var().item() == pytest.approx(s2, rel=0.05)
    assert isinstance(model.likelihood, Gaussian)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_draws_what_its_moves_make_of_a_linear_predictor_in_fewer_calls(eta):
    """x_s is then linear in x_t too, so its variance is known; with η = 0 it is close to the data's."""
    s2, calls = 0.25, []
    model = linear_model(diffusion.cosine(200), s2)
    model.sampler = partial(diffusion.ddim, num_steps=40, eta=eta)
    model.network.register_forward_hook(lambda *_: calls.append(1))
    samples = model.sample(20_000)
    assert len(calls) == 40
    variance, bar = 1.0, model.process.alpha_bar.tolist()

    def shrink(t):  # x̂_0 / x_t
        return bar[t] ** 0.5 * s2 / (bar[t] * s2 + 1 - bar[t])

    for move in model.sampler(model.process):
        variance = (move.x0 * shrink(move.t) + move.xt) ** 2 * variance + move.std**2
    variance = shrink(1) ** 2 * variance + model.process.log_reverse_std[1].exp().item() ** 2
    assert samples.var().item() == pytest.approx(variance, rel=0.04)  # 4 standard errors
    if eta == 0:
        assert variance == pytest.approx(s2, rel=0.1)


def test_pixels_are_scored_with_the_clamp_that_sampling_has():
    model = ddpm(Epsilon(), num_steps=50)
    x = torch.randint(0, 17, (32, 1, 4, 4)).to(torch.uint8)
    clipped = model.elbo(x).value.mean()
    model.clip = False
    assert clipped > model.elbo(x).value.mean()


@pytest.mark.parametrize("calls", [0, 1, -3])
def test_too_few_calls_are_refused(calls):
    with pytest.raises(ValueError, match="val_calls"):
        ddpm(Epsilon(), num_steps=10, val_calls=calls)


@pytest.mark.parametrize("schedule", [diffusion.linear, diffusion.cosine, partial(diffusion.log_snr_linear, log_snr_max=12)])
def test_256_levels_cost_the_same_in_mixed_precision(schedule):
    """x̂_0 is an average of 256 levels by probabilities: rounded to eight bits, it would cost up to 0.2 bits/dim."""
    model = ddpm(Lattice(256), num_steps=100, levels=256, schedule=schedule)
    nn.init.zeros_(model.network.conv.weight)
    x, figures = torch.randint(0, 256, (64, 1, 4, 4)).to(torch.uint8), []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            figures.append(model.elbo(x).value.mean().item())
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


@pytest.mark.parametrize("parameterization", [Epsilon(), X0(), Lattice(17)])
def test_mixed_precision_walks_the_chain_in_float32(parameterization, monkeypatch):
    model, seen = ddpm(parameterization, num_steps=5), set()
    usual = model.network.forward
    monkeypatch.setattr(model.network, "forward", lambda x_t, t: (seen.add(x_t.dtype), usual(x_t, t))[1])
    with torch.autocast("cpu", torch.bfloat16):
        model.sample(2)
    assert seen == {torch.float32}


def test_a_chain_whose_signal_vanishes_is_refused_where_noise_is_predicted():
    schedule = partial(diffusion.constant, beta=0.2)
    with pytest.raises(
        ValueError, match=r"parameterization=epsilon divides by sqrt\(alpha_bar_T\).* 3.5e-49 in num_steps=1000"
    ):
        ddpm(Epsilon(), num_steps=1000, schedule=schedule)
    x = torch.randint(0, 17, (8, 1, 4, 4)).to(torch.uint8)
    for model in (ddpm(X0(), num_steps=1000, schedule=schedule), ddpm(Epsilon(), num_steps=325, schedule=schedule)):
        model.objective(x.repeat(50, 1, 1, 1))[0].backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.network.parameters())


@pytest.mark.parametrize("calls", [1, 0, -3, 2.5])
def test_calls_that_would_leave_the_matching_terms_out_are_refused(calls):
    with pytest.raises(ValueError, match=f"calls={calls} must be an integer of at least 2"):
        ddpm(X0(), num_steps=10).elbo(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), calls)


class Three(nn.Module):
    """x̂_0 = 3, which no pixel is."""

    def forward(self, x, t):
        return torch.full_like(x, 3.0)


def test_the_sampler_clamps_what_no_pixel_is():
    model, seen = DDPMLightningModule(Three(), diffusion.cosine, 10, X0(), image_shape=(1, 4, 4), levels=17), []
    model.network.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    torch.manual_seed(0)
    model.sample(4)
    torch.manual_seed(0)
    x = torch.randn(4, 1, 4, 4)
    for move, x_t in zip(model.sampler(model.process), seen, strict=False):
        torch.testing.assert_close(x_t, x)
        x = move(torch.ones_like(x), x)
    torch.testing.assert_close(seen[-1], x)


def test_as_many_calls_as_steps_are_every_step_and_need_no_control():
    model, found = ddpm(X0(), num_steps=9), []
    x = torch.randint(0, 17, (6, 1, 4, 4)).to(torch.uint8)
    control = Control(model.process, torch.full((17,), 1 / 17).double(), torch.ones(10, DENOISERS))
    for settings in ((), (9,), (20,), (None, None, control)):
        torch.manual_seed(0)
        found.append(model.elbo(x, *settings).value)
    assert all(torch.equal(other, found[0]) for other in found[1:])
    model.calls["test"] = 9
    assert model.protocol() == {"estimator": "every step, one noise draw each", "network_calls_per_image": 9, "num_steps": 9}


def test_the_terms_of_a_chain_cancel_in_float64():
    model, x = ddpm(X0(), num_steps=4), torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    assert model.dtype == torch.float32
    assert model.log_weight(x).dtype == model.three_variable_elbo(x).value.dtype == torch.float64


@pytest.mark.parametrize("shape", [[8, 8], [1, 8, 0], [1, 1, 8, 8]])
def test_other_image_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="three positive sizes"):
        DDPMLightningModule(nn.Identity(), diffusion.cosine, 3, X0(), image_shape=shape, levels=17)


def test_squared_errors_are_those_of_the_chain_that_samples():
    """x̂_0 of pixels is clamped in them, as it is in the bound beside which they are drawn; a density's is not."""
    x, t = torch.randint(0, 17, (3, 2, 4, 4), dtype=torch.uint8), torch.tensor([[2, 9], [5, 20], [20, 3]])
    for levels, low, high in ((17, -1, 1), (None, -torch.inf, torch.inf)):
        model = DDPMLightningModule(Tiny(2, 1), diffusion.cosine, 20, Epsilon(), image_shape=(2, 4, 4), levels=levels)
        with torch.no_grad():
            draws = model.step_draws(2 * x.float() / 16 - 1, t)
            x0_hat = Epsilon().x0(draws.output, draws.x_t, draws.t, model.process)
            assert x0_hat.abs().max() > 1
            expected = (draws.x0 - x0_hat.clamp(low, high)).square().mean((1, 2, 3)).view(3, 2)
            torch.testing.assert_close(model.squared_errors(draws), expected)
