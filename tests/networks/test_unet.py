"""The U-Net: equal to an independent implementation, and what follows from its settings."""

import re

import pytest
import torch
import torch.nn.functional as F

from losses.draws import Rows, rows_of_global_batch
from networks import UNet
from networks.unet import Upsample

SMALL = {"base_channels": 16, "channel_multipliers": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,)}


def randomised(network, seed=0):
    """Gives every parameter a value, those that start at zero too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network


def diffusers_config(image_size, channels, base, multipliers, attention, num):
    """The configuration of google/ddpm-cifar10-32, for other sizes."""
    attends = [image_size >> level in attention for level in range(len(multipliers))]
    return {
        "sample_size": image_size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": [base * multiplier for multiplier in multipliers],
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "layers_per_block": num,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "norm_num_groups": 32 if base >= 32 else base,
        "act_fn": "silu",
        "attention_head_dim": None,
        "time_embedding_type": "positional",
        "mid_block_scale_factor": 1,
        "center_input_sample": False,
    }


def theirs_to_ours(network, num):
    """Names of modules: diffusers -> ours, walked through in the order of the forward pass."""
    names = {"conv_in": "stem", "conv_norm_out": "head.0", "conv_out": "head.2"}
    names |= {"time_embedding.linear_1": "time.0", "time_embedding.linear_2": "time.2"}

    def block(theirs, index, ours):
        for a, b in {"time_emb_proj": "time", "conv_shortcut": "shortcut"}.items():
            names[f"{theirs}.resnets.{index}.{a}"] = f"{ours}.residual.{b}"
        for same in ("norm1", "norm2", "conv1", "conv2"):
            names[f"{theirs}.resnets.{index}.{same}"] = f"{ours}.residual.{same}"
        for a, b in {"group_norm": "norm", "to_q": "qkv.0", "to_k": "qkv.1", "to_v": "qkv.2", "to_out.0": "out"}.items():
            names[f"{theirs}.attentions.{index}.{a}"] = f"{ours}.attention.{b}"

    for way, blocks, sampler in (("down", num, "downsamplers"), ("up", num + 1, "upsamplers")):
        for position, module in enumerate(getattr(network, way)):
            level, index = divmod(position, blocks + 1)
            if index < blocks:
                block(f"{way}_blocks.{level}", index, f"{way}.{position}")
            else:
                assert type(module).__name__.endswith("sample")
                names[f"{way}_blocks.{level}.{sampler}.0.conv"] = f"{way}.{position}"
    block("mid_block", 0, "middle.0")
    block("mid_block", 1, "middle.1")
    return names


def copy_weights(theirs, ours, num):
    names = theirs_to_ours(ours, num)
    state, qkv = {}, {}
    for key, value in theirs.state_dict().items():
        module, kind = key.rsplit(".", 1)
        name = names[module]
        if part := re.fullmatch(r"(.*\.qkv)\.(\d)", name):
            qkv.setdefault(f"{part[1]}.{kind}", {})[int(part[2])] = value
        else:
            state[f"{name}.{kind}"] = value
    state |= {key: torch.cat([parts[0], parts[1], parts[2]]) for key, parts in qkv.items()}
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    state = {key: value.reshape(shapes[key]) for key, value in state.items()}  # linear -> 1x1 convolution
    ours.load_state_dict(state, assign=True)


@pytest.mark.parametrize(
    ("image_size", "channels", "base", "multipliers", "attention", "num", "batch"),
    [(32, 3, 128, (1, 2, 2, 2), (16,), 2, 1), (28, 1, 16, (1, 2, 2), (7, 14), 1, 3), (8, 1, 128, (1, 2, 1), (4, 8), 1, 2)],
    ids=["cifar10", "28x28", "8x8"],
)
def test_equals_an_independent_implementation(image_size, channels, base, multipliers, attention, num, batch):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DModel(**diffusers_config(image_size, channels, base, multipliers, attention, num)).eval()
    image_shape = (channels, image_size, image_size)
    settings = {"base_channels": base, "channel_multipliers": multipliers, "attention_resolutions": attention}
    with torch.device("meta"):  # the weights come from theirs
        ours = UNet(image_shape, num_res_blocks=num, **settings).eval()
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    if image_size == 32:
        assert count == 35_746_307
    if base >= 128:  # narrower layers have fewer groups in ours
        copy_weights(theirs, ours, num)
        x, t = torch.randn(batch, *image_shape), torch.randint(1, 1001, (batch,))
        with torch.no_grad():
            expected = theirs(x, t - 1).sample
            torch.testing.assert_close(ours(x, t), expected, rtol=1e-5, atol=1e-5)
        assert expected.std() > 0.05


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (2, 8, 12)])
@pytest.mark.parametrize("outputs", [1, 2, 17])
def test_parameter_major_output_of_the_right_shape(shape, outputs):
    network = UNet(shape, outputs, **SMALL)
    network.head[-1].bias.data = torch.arange(float(outputs * shape[0]))
    out = network(torch.randn(2, *shape), torch.tensor([1, 9]))
    assert out.shape == (2, outputs * shape[0], *shape[1:])
    split = out.unflatten(1, (outputs, shape[0]))
    assert split[0, -1, 0, 0, 0] == (outputs - 1) * shape[0]


def test_untrained_output_is_zero():
    assert UNet((1, 8, 8), **SMALL)(torch.randn(2, 1, 8, 8), torch.tensor([1, 5])).abs().max() == 0


def test_gradients_reach_every_parameter():
    network = randomised(UNet((1, 8, 8), 2, **SMALL))
    network(torch.randn(2, 1, 8, 8), torch.tensor([3, 700])).square().sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


def test_time_matters_example_by_example():
    network = randomised(UNet((1, 8, 8), **SMALL)).eval()
    x = torch.randn(1, 1, 8, 8).expand(3, -1, -1, -1)
    with torch.no_grad():
        out = network(x, torch.tensor([1, 2, 1]))
    torch.testing.assert_close(out[0], out[2])
    assert (out[0] - out[1]).abs().max() > 1e-4


def test_several_heads_differ_from_one():
    outs = []
    for heads in (1, 4):
        network = randomised(UNet((1, 8, 8), num_heads=heads, **SMALL)).eval()
        for module in network.modules():
            if hasattr(module, "qkv"):
                torch.manual_seed(0)
                torch.nn.init.normal_(module.qkv.weight)
        torch.manual_seed(1)
        outs.append(network.middle[0].attention(torch.randn(1, 32, 4, 4)))
    assert (outs[0] - outs[1]).abs().max() > 1e-4


def test_initial_scale_of_queries_is_that_of_a_layer_of_its_own():
    weight = UNet((1, 8, 8), **SMALL).middle[0].attention.qkv.weight
    assert weight.var().item() == pytest.approx(1 / 32, rel=0.1)


def test_bfloat16_autocast_is_close_to_float32():
    network = randomised(UNet((1, 8, 8), **SMALL)).eval()
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([1, 10, 100, 1000])
    with torch.no_grad():
        exact = network(x, t)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = network(x, t)
    assert (narrow - exact).norm() < 0.03 * exact.norm()


def test_runs_in_float64():
    network = randomised(UNet((1, 8, 8), **SMALL)).double()
    assert network(torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([1, 2])).dtype == torch.float64


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"channel_multipliers": (1, 1, 1, 1, 1)}, ["8x8", "channel_multipliers", "16"]),
        ({"channel_multipliers": ()}, ["channel_multipliers"]),
        ({"channel_multipliers": (1, 0)}, ["channel_multipliers"]),
        ({"attention_resolutions": (16,)}, ["8x8", "attention_resolutions", "[8, 4]"]),
        ({"dropout": 1.0}, ["dropout", "1.0"]),
        ({"dropout": -0.1}, ["dropout"]),
        ({"num_heads": 3}, ["num_heads", "32"]),
        ({"base_channels": 0}, ["base_channels"]),
        ({"num_res_blocks": 0}, ["num_res_blocks"]),
    ],
)
def test_refusals_are_one_sentence(setting, says):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refusal:
        UNet((1, 8, 8), **(SMALL | setting))
    assert all(word in str(refusal.value) for word in says)
    assert ". " not in str(refusal.value)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 5, 1, 3), (3, 2, 7, 2)])
def test_upsampling_is_the_nearest_pixel_and_a_convolution(shape):
    layer = Upsample(shape[1]).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), layer.weight, layer.bias, padding=1)
    out, g = layer(x, None), torch.randn_like(expected)
    torch.testing.assert_close(out, expected)
    ours, theirs = (torch.autograd.grad(y, [x, layer.weight, layer.bias], g) for y in (out, expected))
    torch.testing.assert_close(ours, theirs)


def test_checkpointed_activations_give_the_same_gradients_from_a_fraction_of_the_memory():
    """Dropout included, for a rank that holds some rows of the global batch."""
    x, t, results = torch.randn(4, 3, 8, 8), torch.tensor([1, 5, 9, 1000]), []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        network = randomised(UNet((3, 8, 8), dropout=0.3, checkpoint_activations=checkpointed, **SMALL)).train()
        saved = []

        def pack(tensor, saved=saved):
            saved.append(tensor.untyped_storage())
            return tensor

        torch.manual_seed(1)
        parameters = {parameter.data_ptr() for parameter in network.parameters()}
        with rows_of_global_batch(Rows(4, 8, 12)):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                out = network(x, t)
            kept = {storage.data_ptr(): storage.nbytes() for storage in saved if storage.data_ptr() not in parameters}
            torch.rand(7)  # what is drawn in between moves nothing
            out.square().mean().backward()
        results.append((out, [parameter.grad for parameter in network.parameters()], sum(kept.values())))
    (out, gradients, all_kept), (again, gradients_again, few_kept) = results
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))
    assert few_kept < all_kept / 3
