"""One family: DDPM with T = 1 is a VAE, an MHVAE of depth 1 is a VAE, an MHVAE with DDPM's q has DDPM's bound."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.utils.data import DataLoader

import diffusion
from diffusion import X0, Epsilon, Lattice
from lightning_modules import DDPMLightningModule, MarkovPosterior, MHVAELightningModule, TopDownPosterior, VAELightningModule
from lightning_modules.metric import ElboMetric
from lightning_modules.posteriors import product
from losses import DiagGaussian, DiscretizedGaussian, DiscretizedLogistic, Gaussian
from networks import GaussianTransition, MLPDecoder, MLPEncoder
from runs.report import table
from tests.evaluation.models import odd_images, small_ddpm
from tests.lightning_modules.test_ddpm import Tiny, linear_model
from tests.linear_gaussian import elbo_terms

SHAPE, LEVELS = (2, 4, 4), 17


class Marginal(nn.Module):
    """DDPM's q(x_t | x_0) for one t, as an encoder."""

    def __init__(self, process, t):
        super().__init__()
        self.process, self.t = process, t

    def forward(self, x):
        return self.process.marginal(x, torch.full((len(x),), self.t))


class Step(nn.Module):
    """DDPM's q(x_t | x_{t-1}) for one t."""

    def __init__(self, process, t):
        super().__init__()
        self.process, self.t = process, t

    def forward(self, x):
        return self.process.step(x, torch.full((len(x),), self.t))


class Reverse(nn.Module):
    """DDPM's p(x_{t-1} | x_t) for one t."""

    def __init__(self, model, t):
        super().__init__()
        self.model, self.t = [model], t

    def forward(self, x):
        model, t = self.model[0], torch.full((len(x),), self.t)
        return model.process.reverse(model.network(x, t), x, t, model.parameterization, model.clip)


class FirstStep(nn.Module):
    """DDPM's parameters of p(x_0 | x_1), as a decoder."""

    def __init__(self, network, parameterization, process, clip):
        super().__init__()
        self.network, self.parameterization, self.process, self.clip = network, parameterization, process, clip

    def forward(self, z):
        output = self.network(z, torch.ones(len(z), dtype=torch.int64))
        return self.parameterization.likelihood_params(output, z, self.process, self.clip)


def terms(elbo):
    return torch.stack([elbo.reconstruction, elbo.prior, elbo.matching])


@pytest.mark.parametrize("parameterization", [Epsilon(), X0(), Lattice(LEVELS)])
@pytest.mark.parametrize("beta", [0.2, 0.7])
def test_ddpm_of_one_step_is_the_vae_with_that_encoder(parameterization, beta):
    network = Tiny(2, parameterization.outputs_per_channel)
    ddpm = DDPMLightningModule(
        network, lambda T: diffusion.constant(T, beta), 1, parameterization, image_shape=SHAPE, levels=LEVELS
    )
    ddpm.clip = False  # the objective never clamps; here the bound must not either, to be the same function
    vae = VAELightningModule(
        Marginal(ddpm.process, 1),
        FirstStep(network, parameterization, ddpm.process, clip=False),
        parameterization.likelihood(LEVELS),
        latent_dim=32,
        image_shape=SHAPE,
        levels=LEVELS,
    )
    x = torch.randint(0, LEVELS, (16, *SHAPE)).to(torch.uint8)
    results = []
    for model in (ddpm, vae):
        torch.manual_seed(5)
        elbo = model.elbo(x)
        torch.manual_seed(5)
        loss, drawn = model.objective(x)
        gradients = torch.autograd.grad(loss, [*network.conv.parameters(), network.time.weight])
        results.append([terms(elbo), terms(drawn), loss, *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def vae_parts(depth):
    torch.manual_seed(1)
    sizes = {"hidden_dim": 32, "num_blocks": 1, "dropout": 0.0}
    encoder = MLPEncoder(SHAPE, latent_dim=4 * depth, **sizes)
    decoder = MLPDecoder(SHAPE, latent_dim=4, params_per_channel=2, **sizes)
    return encoder, decoder


@pytest.mark.parametrize("posterior", [MarkovPosterior, TopDownPosterior])
def test_mhvae_of_depth_1_is_the_vae(posterior):
    encoder, decoder = vae_parts(1)
    common = {"image_shape": SHAPE, "levels": LEVELS, "likelihood": DiscretizedLogistic(LEVELS), "latent_dim": 4, "beta": 0.7}
    vae = VAELightningModule(encoder, decoder, **common)
    mhvae = MHVAELightningModule(posterior(encoder, [], depth=1, latent_dim=4), decoder, depth=1, **common)
    x = torch.randint(0, LEVELS, (16, *SHAPE)).to(torch.uint8)
    results = []
    for model in (vae, mhvae):
        torch.manual_seed(2)
        loss, elbo = model.objective(x)
        results.append([loss, terms(elbo), *torch.autograd.grad(loss, [*encoder.parameters(), *decoder.parameters()])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_steps", [2, 4])
def test_mhvae_with_ddpms_q_has_ddpms_mean_bound(num_steps):
    """The three-variable form by log ratios against the two-variable form, and both against the closed form."""
    s2, num = 0.25, 200_000
    betas = diffusion.cosine(num_steps)
    ddpm = linear_model(betas, s2, factors=[0.6] * num_steps)
    process = ddpm.process
    transitions = [Step(process, t) for t in range(2, num_steps + 1)]
    mhvae = MHVAELightningModule(
        MarkovPosterior(Marginal(process, 1), transitions, depth=num_steps, latent_dim=1),
        FirstStep(ddpm.network, ddpm.parameterization, process, clip=False),
        Gaussian(),
        depth=num_steps,
        latent_dim=1,
        transition=[Reverse(ddpm, t) for t in range(2, num_steps + 1)],
        image_shape=(1, 1, 1),
        levels=None,
    )
    x = math.sqrt(s2) * torch.randn(num, 1, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        one, other = mhvae.elbo(x).value, ddpm.elbo(x).value
    reconstruction, prior, matching = elbo_terms(betas.tolist(), s2, [0.6] * num_steps)
    for estimate in (one, other):
        assert abs(estimate.mean() - (reconstruction - prior - matching)) < 4 * estimate.std() / num**0.5


@pytest.mark.parametrize("posterior", [MarkovPosterior, TopDownPosterior])
@pytest.mark.parametrize("depth", [2, 3])
def test_hierarchies_have_the_bound_that_multivariate_gaussians_give(posterior, depth):
    """A linear-Gaussian hierarchy: the bound is ln p(x) - KL(q(z|x) ‖ p(z|x)), all of it known."""

    class Affine(nn.Module):
        def __init__(self, slope, log_std, copies=1):
            super().__init__()
            self.slope, self.log_std, self.copies = slope, log_std, copies

        def forward(self, z):
            mean = (self.slope * z.flatten(1)).repeat(1, self.copies)
            return DiagGaussian(mean, torch.full_like(mean, self.log_std))

    class Decoder(nn.Module):
        def forward(self, z):
            return torch.cat([0.8 * z, torch.full_like(z, -0.5)], 1).view(-1, 2, 1, 1)

    markov = posterior is MarkovPosterior
    encoder = Affine(0.5, -0.3, 1 if markov else depth)
    model = MHVAELightningModule(
        posterior(encoder, [Affine(0.7, -0.2) for _ in range(depth - 1)], depth=depth, latent_dim=1),
        Decoder(),
        Gaussian(),
        depth=depth,
        latent_dim=1,
        transition=[Affine(0.9, -0.4) for _ in range(depth - 1)],
        image_shape=(1, 1, 1),
        levels=None,
    )
    x = torch.full((200_000, 1, 1, 1), 0.7, dtype=torch.float64)
    value = model.elbo(x).value
    expected = hierarchy_elbo(0.7, depth, markov)
    assert abs(value.mean().item() - expected) < 4 * value.std().item() / len(x) ** 0.5


def hierarchy_elbo(x, depth, markov):
    """ln p(x) - KL(q(z|x) ‖ p(z|x)) by multivariate Gaussians alone; z = (z_1, ..., z_T)."""

    def joint(order, rows):
        """Mean and covariance of variables drawn in ``order`` as offset + Σ weight · earlier + std · ε."""
        weights, offset, variance = torch.zeros(depth, depth).double(), torch.zeros(depth).double(), torch.zeros(depth).double()
        for index, (parent, weight, constant, std) in zip(order, rows, strict=True):
            offset[index], variance[index] = constant, std**2
            if parent is not None:
                weights[index, parent] = weight
        inverse = torch.linalg.inv(torch.eye(depth).double() - weights)
        return inverse @ offset, inverse @ torch.diag(variance) @ inverse.T

    top = depth - 1
    down = list(range(top, -1, -1))
    _mean, cov = joint(down, [(None, 0, 0.0, 1.0), *[(t + 1, 0.9, 0.0, math.exp(-0.4)) for t in down[1:]]])
    readout = torch.zeros(depth).double()
    readout[0] = 0.8
    variance = (readout @ cov @ readout + math.exp(-1.0)).item()
    gain = cov @ readout / variance
    true = MultivariateNormal(gain * x, cov - torch.outer(gain, gain) * variance)
    if markov:
        rows = [(None, 0, 0.5 * x, math.exp(-0.3)), *[(t - 1, 0.7, 0.0, math.exp(-0.2)) for t in range(1, depth)]]
        q = joint(range(depth), rows)
    else:
        evidence, prior = math.exp(0.6), math.exp(0.8)  # precisions
        total = evidence + prior
        step = (0.9 * prior / total, 0.5 * x * evidence / total, total**-0.5)
        q = joint(down, [(None, 0, 0.5 * x, math.exp(-0.3)), *[(t + 1, *step) for t in down[1:]]])
    log_p = -0.5 * math.log(2 * math.pi * variance) - 0.5 * x * x / variance
    return log_p - kl_divergence(MultivariateNormal(*q), true).item()


def test_top_down_steps_are_products_of_gaussians():
    a, b = (DiagGaussian(torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)) for _ in range(2))
    one, other = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    q = product(a, b)
    # ln a + ln b - ln q does not depend on where it is taken
    torch.testing.assert_close(
        a.log_prob(one) + b.log_prob(one) - q.log_prob(one), a.log_prob(other) + b.log_prob(other) - q.log_prob(other)
    )
    far = product(DiagGaussian(torch.ones(1, 1), torch.tensor(-40.0)), DiagGaussian(torch.zeros(1, 1), torch.tensor(40.0)))
    assert far.mean.item() == 1
    assert far.log_std.item() == pytest.approx(-40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -1.0}, "model.beta=-1.0"),
        ({"likelihood": DiscretizedGaussian(256)}, "256 levels"),
        ({"levels": None}, "continuous"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    encoder, decoder = vae_parts(1)
    given = {"image_shape": SHAPE, "levels": LEVELS, "likelihood": DiscretizedGaussian(LEVELS), "latent_dim": 4} | settings
    with pytest.raises(ValueError, match=message) as error:
        VAELightningModule(encoder, decoder, **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("depth", [0, -1, 1.5])
def test_impossible_depths_are_refused(depth):
    encoder, decoder = vae_parts(1)
    with pytest.raises(ValueError, match=r"model\.depth"):
        MHVAELightningModule(
            TopDownPosterior(encoder, [], 1, 4), decoder, DiscretizedLogistic(17), depth, 4, image_shape=SHAPE, levels=17
        )


def test_the_gradient_vanishes_at_the_predictor_that_theory_names():
    s2, num = 0.5, 400_000
    x = math.sqrt(s2) * torch.randn(num, 1, 1, 1, dtype=torch.float64)
    gradients = {}
    for name, factors in {"optimal": None, "poor": [0.1] * 4}.items():
        model = linear_model(diffusion.cosine(4), s2, factors)
        (gradients[name],) = torch.autograd.grad(-model.elbo(x).value.mean(), model.network.factors)
    assert (gradients["optimal"].abs() < gradients["poor"].abs() / 50).all()


def models():
    """One of each family, for images of SHAPE."""
    settings = {"image_shape": SHAPE, "levels": LEVELS}
    encoder, decoder = partial(MLPEncoder, hidden_dim=8), partial(MLPDecoder, hidden_dim=8)
    vae = VAELightningModule(encoder, decoder, DiscretizedLogistic(LEVELS), 3, **settings)
    transition = partial(GaussianTransition, hidden_dim=8)
    mhvae = MHVAELightningModule(
        TopDownPosterior, decoder, DiscretizedLogistic(LEVELS), 2, 3, encoder=encoder, transition=transition, **settings
    )
    ddpm = DDPMLightningModule(Tiny(2, 1), diffusion.cosine, 4, Epsilon(), **settings)
    return {"vae": vae, "mhvae": mhvae, "ddpm": ddpm}


@pytest.mark.parametrize("name", ["vae", "mhvae", "ddpm"])
def test_a_bare_trainer_validates_before_and_between_training(name, tmp_path):
    model = models()[name]
    loader = DataLoader(torch.randint(0, LEVELS, (20, *SHAPE)).to(torch.uint8), batch_size=10)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    before = trainer.validate(model, loader, verbose=False)[0]["val/bpd"]
    trainer.fit(model, loader, loader)
    after = trainer.validate(model, loader, verbose=False)[0]["val/bpd"]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader, loader)
    assert before != after


@pytest.mark.parametrize("name", ["vae", "mhvae", "ddpm"])
def test_images_of_another_shape_or_kind_have_no_bound(name):
    model, images = models()[name], torch.randint(0, LEVELS, (4, *SHAPE)).to(torch.uint8)
    assert model.elbo(images).value.isfinite().all()
    assert model.elbo(images[:0]).value.shape == (0,)
    for wrong in (images[:, 0], images[:, :1], images[..., :2], images.float(), model.to_unit(images)):
        with pytest.raises(ValueError, match="images"):
            model.elbo(wrong)


def test_what_would_broadcast_to_a_finite_bound_is_refused():
    x, x_t = torch.zeros(4, 2, 3, 3, dtype=torch.uint8), torch.zeros(4, 2, 3, 3)
    for likelihood in (DiscretizedGaussian(17), DiscretizedLogistic(17), Gaussian()):
        for params in (torch.zeros(4, 6, 3, 3), torch.zeros(1, 4, 3, 3), torch.zeros(4, 4, 1, 1)):
            with pytest.raises(ValueError, match="do not belong to images"):
                likelihood.log_prob(params, x)
    process, t = diffusion.GaussianDiffusion(diffusion.cosine(5)), torch.full((4,), 3)
    for parameterization in (Epsilon(), X0(), Lattice(3)):
        for output in (torch.zeros(4, 4, 3, 3), torch.zeros(1, 2, 3, 3), torch.zeros(4, 2, 1, 1)):
            with pytest.raises(ValueError, match="the network gives"):
                process.reverse(output, x_t, t, parameterization)
    for method in (process.marginal, process.step):
        with pytest.raises(TypeError, match="to_unit"):
            method(x, t)
    with pytest.raises(TypeError, match="to_unit"):
        process.prior_kl(x)


def test_schedules_variances_and_weightings_of_another_length_are_refused():
    settings = {"image_shape": SHAPE, "levels": LEVELS, "num_steps": 4, "parameterization": Epsilon()}
    with pytest.raises(ValueError, match="8 betas for num_steps=4"):
        DDPMLightningModule(Tiny(2, 1), lambda num: diffusion.constant(2 * num, 0.3), **settings)
    for variance, message in (
        (lambda betas: betas[:-1], r"4 numbers, .* shape \(3,\)"),
        (lambda betas: -betas, "at t=1: .* positive"),
    ):
        with pytest.raises(ValueError, match=message):
            DDPMLightningModule(Tiny(2, 1), diffusion.cosine, variance=variance, **settings)
    model = DDPMLightningModule(Tiny(2, 1), diffusion.cosine, weighting=lambda terms: terms.term.mean(), **settings)
    with pytest.raises(ValueError, match="the weighting gives shape"):
        model.objective(torch.zeros(4, *SHAPE, dtype=torch.uint8))
    model = DDPMLightningModule(Tiny(2, 1), diffusion.cosine, weighting=lambda terms: None, **settings)
    with pytest.raises(ValueError, match="the weighting gives NoneType"):
        model.objective(torch.zeros(4, *SHAPE, dtype=torch.uint8))
    for drawn in (torch.tensor([3]), torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 5])):
        model = DDPMLightningModule(Tiny(2, 1), diffusion.cosine, timestep_sampler=lambda *_, t=drawn: t, **settings)
        with pytest.raises(ValueError, match="not a step from 1 to 4 for each of 4"):
            model.objective(torch.zeros(4, *SHAPE, dtype=torch.uint8))


def test_an_encoder_that_gives_no_distribution_is_refused():
    _, decoder = vae_parts(1)
    vae = VAELightningModule(torch.nn.Identity(), decoder, DiscretizedLogistic(LEVELS), 4, image_shape=SHAPE, levels=LEVELS)
    with pytest.raises(ValueError, match="the encoder gives Tensor"):
        vae.elbo(torch.zeros(4, *SHAPE, dtype=torch.uint8))


def test_transitions_of_p_are_not_silently_those_of_q_too():
    transitions, encoder = [GaussianTransition(3, 3, hidden_dim=8)], partial(MLPEncoder, hidden_dim=8)
    with pytest.raises(ValueError, match="this posterior has its own"):
        MHVAELightningModule(
            MarkovPosterior, partial(MLPDecoder, hidden_dim=8), DiscretizedLogistic(LEVELS), 2, 3, encoder=encoder,
            transition=transitions, image_shape=SHAPE, levels=LEVELS,
        )  # fmt: skip


def test_a_posterior_that_is_built_here_needs_an_encoder():
    with pytest.raises(ValueError, match=r"model\.encoder is missing"):
        MHVAELightningModule(
            MarkovPosterior, nn.Identity(), DiscretizedLogistic(LEVELS), 2, 3, image_shape=SHAPE, levels=LEVELS
        )


def test_beta_weighs_matching_as_it_weighs_the_prior():
    model, x = models()["mhvae"], torch.randint(0, LEVELS, (16, *SHAPE)).to(torch.uint8)
    model.beta = 0.3
    loss, elbo = model.objective(x)
    assert elbo.matching.abs().min() > 0
    torch.testing.assert_close(loss, (0.3 * (elbo.prior + elbo.matching) - elbo.reconstruction).mean() / math.prod(SHAPE))


class Affine(nn.Module):
    """z -> N(a z + a, σ²)."""

    def __init__(self, slope, std):
        super().__init__()
        self.slope, self.std = slope, std

    def forward(self, z):
        return DiagGaussian(self.slope * z + self.slope, torch.tensor(math.log(self.std)))


class Bare(nn.Module):
    """Decodes one number as a pixel of nearly no variance."""

    def forward(self, z):
        return torch.cat([z, torch.full_like(z, -9.0)], 1).view(-1, 2, 1, 1)


def test_a_hierarchy_is_drawn_from_the_top():
    model = MHVAELightningModule(
        TopDownPosterior(nn.Identity(), None, 3, 1), Bare(), Gaussian(), depth=3, latent_dim=1,
        transition=[Affine(0.5, 1.0), Affine(2.0, 0.3)], image_shape=(1, 1, 1), levels=None,
    )  # fmt: skip
    x = model.sample(100_000)
    assert x.mean().item() == pytest.approx(0.5 * 2.0 + 0.5, abs=0.03)
    assert x.var().item() == pytest.approx(0.25 * (4 + 0.09) + 1, rel=0.03)


@pytest.mark.parametrize("name", ["vae", "mhvae"])
def test_means_or_draws_are_shown_as_it_is_asked(name):
    model, asked = models()[name], []
    model.likelihood = SimpleNamespace(mean=lambda _: asked.append("mean"), sample=lambda _: asked.append("sample"))
    model.sample(2, mean=True)
    model.sample(2)
    model.reconstruct(torch.zeros(2, *SHAPE, dtype=torch.uint8))
    assert asked == ["mean", "sample", "mean"]


@pytest.mark.parametrize(("posterior", "depth"), [(MarkovPosterior, 3), (MarkovPosterior, 1), (TopDownPosterior, 3)])
def test_costs_that_may_be_negative_are_not_called_kls(posterior, depth):
    model = MHVAELightningModule(
        posterior, partial(MLPDecoder, hidden_dim=8), DiscretizedLogistic(17), depth, 2,
        encoder=partial(MLPEncoder, hidden_dim=8), transition=partial(GaussianTransition, hidden_dim=8),
        image_shape=(1, 4, 4), levels=17,
    )  # fmt: skip
    *matching, prior = model.latent_kls(torch.randint(17, (200, 1, 4, 4), dtype=torch.uint8))
    assert model.consistency == any(bool((kls < -1e-6).any()) for kls in matching)
    assert bool((prior >= 0).all())
    metrics = {f"test/{term}{end}": 1.0 for term in ("reconstruction", "prior", "matching", "elbo") for end in ("", "_se")}
    printed = list(table(metrics, model, "").columns[0].cells)
    assert any("ln q/p" in name for name in printed) == model.consistency


@pytest.mark.parametrize(("calls", "words"), [(None, "± one standard error"), (12, "± one"), (3, "± at most one standard")])
def test_a_standard_error_that_is_too_large_as_images_share_steps_is_printed_as_such(calls, words):
    model, x = small_ddpm(12), odd_images(128)
    model.calls["test"] = calls
    metrics = {f"test/{term}{end}": 1.0 for term in ("reconstruction", "prior", "matching", "elbo") for end in ("", "_se")}
    assert table(metrics, model, "").caption.startswith(words)
    if calls != 3:
        return
    found = {"elbo": [], "elbo_se": []}
    with torch.inference_mode():
        for seed in range(60):
            torch.manual_seed(seed)
            metric = ElboMetric()
            metric.update(model.elbo(x, calls))
            for name, value in metric.compute().items():
                found.get(name, []).append(value.item())
    assert torch.tensor(found["elbo"]).std() < 0.7 * torch.tensor(found["elbo_se"]).mean()  # though images vary as well


def test_each_transition_has_parameters_of_its_own():
    model = MHVAELightningModule(
        TopDownPosterior, partial(MLPDecoder, hidden_dim=8), DiscretizedLogistic(17), 3, 2,
        encoder=partial(MLPEncoder, hidden_dim=8), transition=partial(GaussianTransition, hidden_dim=8),
        image_shape=(1, 4, 4), levels=17,
    )  # fmt: skip
    assert len({id(p) for p in model.generative.parameters()}) == 2 * len(list(model.generative[0].parameters()))


def test_gradients_are_clipped_by_the_algorithm_that_is_asked_for(tmp_path):
    model = models()["vae"]
    model.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    for algorithm in ("value", None):
        gradients = [3 * torch.randn_like(parameter) for parameter in model.parameters()]
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        model.configure_gradient_clipping(optimizer, 0.5, algorithm)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient.clamp(-0.5, 0.5) if algorithm else gradient * 0.5 / norm)
