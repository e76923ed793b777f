"""Fully connected networks: shapes, gradients, layout of parameters and refusals."""

import pytest
import torch

from losses import DiagGaussian, kl
from networks.conv import LOG_STD_RANGE
from networks.mlp import GaussianHead, MLPDecoder, MLPDenoiser, MLPEncoder, PixelHead, ResidualBlock
from networks.transitions import GaussianTransition

SHAPES = [(1, 8, 8), (3, 5, 7), (1, 28, 28)]
SMALL = {"hidden_dim": 16, "num_blocks": 2}


@pytest.mark.parametrize("shape", SHAPES)
def test_encoder_and_decoder_shapes(shape):
    x = torch.rand(4, *shape) * 2 - 1
    q = MLPEncoder(shape, latent_dim=5, **SMALL)(x)
    assert q.mean.shape == q.log_std.shape == (4, 5)
    params = MLPDecoder(shape, 5, params_per_channel=3, **SMALL)(q.sample())
    assert params.shape == (4, 3 * shape[0], *shape[1:])
    assert params.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("outputs", [1, 17])
def test_denoiser_shape_and_dependence_on_the_step(shape, outputs):
    net = MLPDenoiser(shape, outputs, **SMALL)
    x_t = torch.randn(4, *shape)
    out = net(x_t, torch.tensor([1, 2, 500, 1000]))
    assert out.shape == (4, outputs * shape[0], *shape[1:])
    assert out.isfinite().all()
    assert not torch.allclose(out[1], net(x_t, torch.tensor([1, 3, 500, 1000]))[1])


def test_a_condition_scales_around_one_and_shifts_the_norm():
    block, plain = ResidualBlock(6, 0.0, condition_dim=3), ResidualBlock(6, 0.0)
    plain.load_state_dict(block.state_dict(), strict=False)
    h, condition = torch.randn(4, 6), torch.randn(4, 3)
    scale, shift = block.film(condition).chunk(2, 1)
    torch.testing.assert_close(block(h, condition), h + block.mlp(block.norm(h) * (1 + scale) + shift))
    with torch.no_grad():
        block.film.weight.zero_()
        block.film.bias.zero_()
    torch.testing.assert_close(block(h, condition), plain(h))


def test_denoiser_of_one_image_has_the_best_answer_for_normal_data_in_its_reach():
    net, x_t, t = MLPDenoiser((2, 4, 4), **SMALL), torch.randn(3, 2, 4, 4), torch.tensor([1, 2, 9])
    assert not net.gain.weight.any()
    before = net(x_t, t)
    with torch.no_grad():
        net.gain.bias.fill_(0.5)
        net.gain.weight.normal_()
    gains = ((net(x_t, t) - before) / x_t).flatten(1)
    assert torch.allclose(gains, gains[:, :1].expand_as(gains), rtol=1e-3)  # one number for each step
    assert gains[:, 0].unique().numel() == 3


@pytest.mark.parametrize("pixel_features", [1, 2])
def test_layout_is_parameter_major(pixel_features):
    head = PixelHead(5, (3, 2, 2), 2, pixel_features)
    bias = head.features.bias if head.bias is None else head.bias
    torch.nn.init.zeros_(head.features.weight)
    torch.nn.init.zeros_(head.features.bias)
    with torch.no_grad():
        bias.copy_(torch.arange(2.0).repeat_interleave(3 * 2 * 2).view_as(bias))  # the number of the parameter
    params = head(torch.randn(4, 5)).unflatten(1, (2, 3))
    torch.testing.assert_close(params[:, 0], torch.zeros(4, 3, 2, 2))
    torch.testing.assert_close(params[:, 1], torch.ones(4, 3, 2, 2))


def test_few_pixel_features_make_a_small_head():
    levels, hidden = 256, 32
    full = PixelHead(hidden, (3, 8, 8), levels, levels)
    narrow = PixelHead(hidden, (3, 8, 8), levels, 4)
    assert full(torch.randn(2, hidden)).shape == narrow(torch.randn(2, hidden)).shape == (2, 3 * levels, 8, 8)
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in full.parameters()) / 15


def test_a_small_head_starts_near_a_uniform_distribution():
    full, narrow = (PixelHead(256, (3, 8, 8), 256, features)(torch.randn(64, 256)).std() for features in (256, 4))
    assert narrow < 0.6 * full


def gaussian_loss(q: DiagGaussian) -> torch.Tensor:
    return kl(q, DiagGaussian.standard(q.mean)).sum()


@pytest.mark.parametrize(
    ("net", "loss"),
    [
        (MLPEncoder((1, 4, 4), 3, **SMALL), lambda net: gaussian_loss(net(torch.randn(4, 1, 4, 4)))),
        (MLPDecoder((1, 4, 4), 3, 2, **SMALL), lambda net: net(torch.randn(4, 3)).square().sum()),
        (MLPDenoiser((1, 4, 4), 17, **SMALL), lambda net: net(torch.randn(4, 1, 4, 4), torch.arange(1, 5)).square().sum()),
        (MLPDenoiser((1, 4, 4), 2, **SMALL), lambda net: net(torch.randn(4, 1, 4, 4), torch.arange(1, 5)).square().sum()),
        (GaussianTransition(7, 3, **SMALL), lambda net: gaussian_loss(net(torch.randn(4, 7)))),
    ],
    ids=["encoder", "decoder", "lattice denoiser", "denoiser", "transition"],
)
def test_gradient_reaches_every_parameter(net, loss):
    loss(net).backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not dead


@pytest.mark.parametrize("sign", [-1, 1])
def test_log_std_is_bounded_and_keeps_its_gradient(sign):
    head = GaussianHead(2, 3)
    with torch.no_grad():
        head.weight.fill_(0.5)
    q = head(torch.full((1, 2), 12.0 * sign))
    low, high = LOG_STD_RANGE
    assert (low < q.log_std).all()
    assert (q.log_std < high).all()
    q.log_std.sum().backward()
    assert head.weight.grad[3:].abs().min() > 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLPEncoder((1, 4, 4), 3, hidden_dim=0), "hidden_dim must be an integer of at least 1, got 0"),
        (lambda: MLPEncoder((1, 4, 4), 0), "latent_dim must be an integer of at least 1, got 0"),
        (
            lambda: MLPDecoder((1, 4, 4), 3, 2, num_blocks=0),
            "num_blocks must be an integer of at least 1 and at most 10000, got 0",
        ),
        (lambda: MLPDenoiser((1, 4, 4), hidden_dim=2.5), r"hidden_dim must be an integer of at least 1, got 2\.5"),
        (lambda: MLPDenoiser((1, 4, 4), dropout=1.0), "dropout must be a probability"),
        (lambda: MLPDenoiser((1, 4, 4), pixel_features=0), "pixel_features must be an integer of at least 1, got 0"),
        (lambda: MLPDenoiser((1, 4, 4), time_dim=1), "time_dim must be an integer of at least 2, got 1: the network could not"),
        (lambda: GaussianTransition(0, 3), "in_dim must be an integer of at least 1, got 0"),
    ],
)
def test_refusals_are_one_sentence(build, message):
    with pytest.raises(ValueError, match=message):
        build()
