"""The convolutional encoder and decoder: any image size, finite before training, gradients everywhere."""

import math

import pytest
import torch

from losses import Categorical, DiagGaussian, DiscretizedLogistic, kl
from networks import ConvDecoder, ConvEncoder

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 13, 7), (1, 3, 1)]
SMALL = {"channels": (8, 12, 16)}
SMALL_BACK = {"channels": (16, 12, 8)}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_any_image(shape):
    x = torch.rand(5, *shape) * 2 - 1
    q = ConvEncoder(shape, 6, **SMALL)(x)
    assert q.mean.shape == q.log_std.shape == (5, 6)
    for params in (1, 2, 17):
        assert ConvDecoder(shape, 6, params, **SMALL_BACK)(q.sample()).shape == (5, params * shape[0], *shape[1:])


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 28, 28)])
def test_untrained_terms_are_finite_and_gradients_reach_every_parameter(shape):
    encoder, decoder = ConvEncoder(shape, 4, **SMALL), ConvDecoder(shape, 4, 2, **SMALL_BACK)
    for block in [*encoder.modules(), *decoder.modules()]:  # blocks start as the identity: no gradient before conv2 at first
        if hasattr(block, "conv2"):
            torch.nn.init.normal_(block.conv2.weight, std=0.1)
    x = torch.randint(256, (4, *shape), dtype=torch.uint8)
    q = encoder(2 * x / 255 - 1)
    reconstruction = DiscretizedLogistic(256).log_prob(decoder(q.sample()), x)
    prior = kl(q, DiagGaussian.standard(q.mean))
    assert reconstruction.isfinite().all()
    assert prior.isfinite().all()
    assert (prior < 40).all()
    (prior - reconstruction).sum().backward()
    for part in (encoder, decoder):
        assert [name for name, p in part.named_parameters() if not p.grad.abs().max() > 0] == []


def test_untrained_decoder_knows_next_to_nothing_but_hears_z():
    decoder, x = ConvDecoder((1, 8, 8), 4, 17), torch.randint(17, (3, 1, 8, 8), dtype=torch.uint8)
    out = decoder(torch.randn(3, 4))
    bits = -Categorical(17).log_prob(out, x) / (64 * math.log(2))
    torch.testing.assert_close(bits, torch.full((3,), math.log2(17)), atol=0.02, rtol=0)
    assert (out[0] - out[1]).abs().max() > 0


def test_parameter_major_output():
    decoder = ConvDecoder((3, 8, 8), 4, 2, **SMALL_BACK)
    decoder.head[-1].bias.data = torch.tensor([0.0, 1, 2, 10, 11, 12])
    split = decoder(torch.zeros(1, 4)).unflatten(1, (2, 3))[0, :, :, 4, 4]
    torch.testing.assert_close(split, torch.tensor([[0.0, 1, 2], [10, 11, 12]]), atol=0.1, rtol=0)


def test_extreme_activations_keep_log_std_in_range():
    encoder = ConvEncoder((1, 8, 8), 4, **SMALL)
    encoder.head.weight.data *= 1e4
    log_std = encoder(torch.rand(8, 1, 8, 8)).log_std
    assert log_std.min() >= -7
    assert log_std.max() < 3.001


def test_bfloat16_autocast_is_close_to_float32():
    encoder, decoder = ConvEncoder((1, 28, 28), 8), ConvDecoder((1, 28, 28), 8, 2)
    x, z = torch.rand(4, 1, 28, 28) * 2 - 1, torch.randn(4, 8)
    with torch.no_grad():
        q, out = encoder(x), decoder(z)
        with torch.autocast("cpu", torch.bfloat16):
            narrow_q, narrow_out = encoder(x), decoder(z)
    assert narrow_q.mean.dtype == narrow_q.log_std.dtype == torch.float32
    torch.testing.assert_close(narrow_q.mean, q.mean, atol=0.05, rtol=0.05)
    torch.testing.assert_close(narrow_q.log_std, q.log_std, atol=0.05, rtol=0.05)
    assert (narrow_out - out).norm() < 0.05 * out.norm()


@pytest.mark.parametrize(
    "make", [lambda **kw: ConvEncoder((1, 8, 8), **kw), lambda **kw: ConvDecoder((1, 8, 8), params_per_channel=2, **kw)]
)
@pytest.mark.parametrize("setting", [{"channels": ()}, {"channels": (8, 0)}, {"latent_dim": 0}, {"dropout": 1.0}])
def test_refusals_are_one_sentence(make, setting):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refusal:
        make(**({"latent_dim": 4} | setting))
    assert next(iter(setting)) in str(refusal.value)
    assert ". " not in str(refusal.value)
