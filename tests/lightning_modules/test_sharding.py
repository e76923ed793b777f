"""Which weights of a sharded network are whole, when."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_modules.sharding import gather, release, shard, unshardable
from runs.build import build_part
from runs.devices import shards_on_cpu
from tests.jobs import configure

MODELS = {
    "vae": ("model=vae",),
    "mhvae": ("model=mhvae",),
    "ddpm": ("model=ddpm", "model/network=unet_8x8", "model.network.base_channels=8", "model.num_steps=5"),
}


@pytest.fixture
def mesh(tmp_path):
    """One process alone."""
    if not shards_on_cpu():
        pytest.skip("this PyTorch shards on GPUs only")
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    torch.distributed.destroy_process_group()


def whole(model):
    return {name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)}


@pytest.mark.parametrize("loose", [torch.nn.Parameter(torch.zeros(3)), torch.nn.ParameterList([torch.zeros(3)])])
def test_parameters_that_no_network_would_gather_are_refused(loose, mesh, tmp_path):
    model = build_part(configure(tmp_path, "model=vae").model)
    model.mean = loose
    with pytest.raises(ValueError, match="VAELightningModule, of which mean stand outside of its networks"):
        shard(model, mesh)


def test_parameters_of_two_places_and_single_numbers_are_refused(mesh, tmp_path):
    def built():
        return build_part(configure(tmp_path, "model=vae").model)

    tied, scalar = built(), built()
    tied.decoder.again = tied.encoder
    scalar.encoder.scale = torch.nn.Parameter(torch.tensor(1.0))
    for model, words in (
        (tied, r"encoder\.\S+, decoder\.again\.\S+ are one parameter"),
        (scalar, r"encoder\.scale are single"),
    ):
        with pytest.raises(ValueError, match=words):
            shard(model, mesh)
    assert unshardable(built()) is None


@pytest.mark.parametrize("name", MODELS)
def test_an_evaluation_between_two_steps_changes_nothing_of_what_is_gathered_when(name, mesh, tmp_path):
    model = build_part(configure(tmp_path, *MODELS[name]).model).train()
    names = {name for name, _ in model.named_parameters()}
    shard(model, mesh)
    x = torch.randint(model.levels, (2, *model.image_shape), dtype=torch.uint8)
    seen = []
    for _ in range(2):
        loss, _ = model.objective(x)
        between = whole(model)
        loss.backward()
        seen.append((between, whole(model)))
        gather(model)
        with torch.inference_mode():
            model.elbo(x)
        assert whole(model) == names
        release(model)
        assert not whole(model)
    assert seen[1] == seen[0]
    between, after = seen[0]
    assert set() < between < names  # the networks' own part waits for the backward pass, their blocks do not
    assert not after
