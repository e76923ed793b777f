"""Layers that several networks share: dropout over ranks, the time embedding, group sizes and the soft clamp."""

import itertools
import math
from functools import partial

import pytest
import torch

from losses.draws import Rows, rows_of_global_batch
from networks import ConvDecoder, Dropout, MLPDecoder, MLPDenoiser, UNet
from networks.layers import group_norm, soft_clamp, timestep_embedding


@pytest.mark.parametrize("cuts", [[0, 3, 6], [0, 2, 4, 6], [0, 1, 5, 6]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_drop_what_one_device_drops(cuts, dtype):
    dropout, x = Dropout(0.3), torch.randn(6, 5, 4, 4, dtype=dtype)
    torch.manual_seed(0)
    whole = dropout(x)
    for start, stop in itertools.pairwise(cuts):
        torch.manual_seed(0)
        with rows_of_global_batch(Rows(start, stop, 6)):
            assert torch.equal(dropout(x[start:stop]), whole[start:stop])


def test_a_training_unet_gives_the_same_on_ranks():
    network = UNet((1, 8, 8), base_channels=8, channel_multipliers=(1, 2), attention_resolutions=(), dropout=0.5)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 4])
    torch.manual_seed(0)
    whole = network(x, t)
    torch.manual_seed(0)
    with rows_of_global_batch(Rows(2, 4, 4)):
        torch.testing.assert_close(network(x[2:], t[2:]), whole[2:], rtol=1e-4, atol=1e-4)


def test_mask_does_not_depend_on_precision():
    x = torch.ones(4, 100)
    torch.manual_seed(0)
    wide = Dropout(0.3)(x.double())
    torch.manual_seed(0)
    assert torch.equal(Dropout(0.3)(x.bfloat16()) == 0, wide == 0)


def test_dropout_keeps_the_expectation_and_gradient_follows_the_mask():
    x = torch.ones(200, 1000, requires_grad=True)
    out = Dropout(0.2)(x)
    assert out.mean().item() == pytest.approx(1, abs=5 * math.sqrt(0.2 / 0.8 / out.numel()))
    assert out.unique().tolist() == pytest.approx([0.0, 1.25], rel=1e-5)
    out.sum().backward()
    assert torch.equal(x.grad, out)


@pytest.mark.parametrize("p", [0.4, 0.999, 0.9999, 1 - 1e-7])
def test_dropout_scales_by_the_probability_that_it_has(p):
    x = torch.ones(4000, 1000)
    torch.manual_seed(0)
    out = Dropout(p)(x)
    scale = out.max().item()
    kept = 2**16 / scale  # of 2^16 values of the mask
    assert kept == pytest.approx(round(kept), rel=1e-6)
    assert kept == pytest.approx(max(1, 2**16 * (1 - p)), abs=0.5)
    assert out.mean().item() == pytest.approx(1, abs=5 * math.sqrt((scale - 1) / out.numel()))


def test_dropout_is_the_identity_in_evaluation_and_at_zero():
    x, state = torch.randn(4, 3), torch.get_rng_state()
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_dropout_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match=r"^dropout must be a probability in \[0, 1\), got [^\n]+$"):
        Dropout(p)


@pytest.mark.parametrize("dim", [1, 2, 7, 128])
def test_timestep_embedding(dim):
    t = torch.tensor([0, 1, 999])
    out = timestep_embedding(t, dim)
    assert out.shape == (3, dim)
    half = dim // 2
    for i in range(half):
        omega = 10_000 ** (-i / max(half - 1, 1))
        torch.testing.assert_close(out[:, i], torch.sin(t * omega).float(), atol=1e-4, rtol=0)
        torch.testing.assert_close(out[:, half + i], torch.cos(t * omega).float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (9, 1), (16, 4), (32, 8), (48, 8), (96, 16), (128, 32), (384, 32)])
def test_groups_hold_four_channels_or_more(channels, groups):
    assert group_norm(channels).num_groups == groups


def test_soft_clamp_stays_inside_and_keeps_the_middle():
    x = torch.linspace(-50, 50, 1001, dtype=torch.float64, requires_grad=True)
    out = soft_clamp(x, -7, 3)
    assert out.min() >= -7
    assert out.max() < 3.001
    assert (out[1:] >= out[:-1]).all()
    middle = (x > -4) & (x < 0)
    torch.testing.assert_close(out[middle], x[middle], atol=0.06, rtol=0)
    out.sum().backward()
    assert (x.grad > 0).all()


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (partial(UNet, (1, 8, 8), 2, 8, (1, 2), 1, ()), (torch.randn(4, 1, 8, 8), torch.arange(1, 5))),
        (partial(MLPDenoiser, (1, 8, 8), 2, 32), (torch.randn(4, 1, 8, 8), torch.arange(1, 5))),
        (partial(MLPDenoiser, (1, 8, 8), 17, 32), (torch.randn(4, 1, 8, 8), torch.arange(1, 5))),
        (partial(MLPDecoder, (1, 8, 8), 3, 2), (torch.randn(4, 3),)),
        (partial(ConvDecoder, (1, 8, 8), 3, 2, (8, 8)), (torch.randn(4, 3),)),
    ],
    ids=["unet", "denoiser", "lattice", "decoder", "conv decoder"],
)
def test_mixed_precision_does_not_round_what_a_network_ends_with(network, inputs):
    """Its last layer still sees rounded features, but no number that it gives has eight bits."""
    network = network()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(*inputs)
    assert output.dtype == torch.float32
    assert not torch.equal(output, output.bfloat16().float())
    assert network.double()(*(x.double() if x.is_floating_point() else x for x in inputs)).dtype == torch.float64
