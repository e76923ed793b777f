"""A model's networks sharded over devices by FSDP2: each device keeps a part of every parameter, gradient and moment.

A parameter is gathered when its block is about to run and let go after it (Zhao et al. 2023, "PyTorch FSDP"). What a module
draws and what it returns stay what they are on one device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def networks(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the parts of a model that are called as one and hold parameters; lists of modules are looked into."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from networks(child)
        elif any(True for _ in child.parameters()):
            yield child


def unshardable(module: nn.Module) -> str | None:
    """Returns a sentence on parameters that cannot be sharded; ``None`` if all can.

    Those in no network: nothing is called that would gather them, and each rank would train its own. Those of two places, which
    may be gathered at two times; and single numbers, which have no parts.
    """
    names = {part: name for name, part in module.named_modules()}
    lists = [names[part] for part in networks(module) if isinstance(part, (nn.ParameterList, nn.ParameterDict))]
    places: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        places.setdefault(parameter, []).append(name)
    shared = [own for own in places.values() if len(own) > 1]
    for fault, found in (
        ("stand outside of its networks: put them into a module that is called",
         [*(name for name, _ in module.named_parameters(recurse=False)), *lists]),
        ("are one parameter in several places: give each place its own", shared[0] if shared else []),
        ("are single numbers: give them a dimension", [own[0] for parameter, own in places.items() if not parameter.ndim]),
    ):  # fmt: skip
        if found:
            model = type(module).__name__
            return f"trainer=fsdp cannot shard {model}, of which {', '.join(found)} {fault}, or choose trainer=ddp"
    return None


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the repeated parts of a network: what has parts of its own and stands in a list or sequence of modules."""
    for child in module.children():
        listed = isinstance(module, (nn.ModuleList, nn.Sequential)) and not isinstance(child, (nn.ModuleList, nn.Sequential))
        if listed and any(True for _ in child.children()) and any(True for _ in child.parameters()):
            yield child
        else:
            yield from blocks(child)


def shard(module: nn.Module, mesh: Any) -> None:
    """Shards every network of a model in place, block by block, and the rest of each network as one more part.

    Args:
        module: the model, with the same weights on every rank.
        mesh: of (nodes, devices of a node): shards within a node; nodes, where links are slow, hold the same shards.

    Raises:
        ValueError: if a parameter cannot be sharded.
    """
    from torch.distributed.fsdp import fully_shard

    if wrong := unshardable(module):
        raise ValueError(wrong)
    mesh = mesh[mesh.mesh_dim_names[1]] if mesh.size(0) == 1 else mesh
    for network in networks(module):
        for part in (*blocks(network), network):
            fully_shard(part, mesh=mesh)


def sharded_parts(module: nn.Module) -> list[Any]:
    """Returns what :func:`shard` sharded: none of them in a model that is whole on every device."""
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def gather(module: nn.Module) -> None:
    """Puts whole networks on every rank until :func:`release`: ranks may then run them out of step with each other.

    An evaluation's last batch is shared unevenly, pictures are drawn by rank 0 alone; a rank that gathered block by block
    would wait for the others forever.
    """
    for part in sharded_parts(module):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


def release(module: nn.Module) -> None:
    """Lets go of what :func:`gather` gathered.

    A network's own part stays whole from its forward to its backward pass, as :func:`shard` left it: it would be gathered again
    at once.
    """
    roots = set(networks(module))
    for part in sharded_parts(module):
        part.set_reshard_after_forward(part not in roots, recurse=False)
        part.reshard()


def local(tensor: Tensor) -> Tensor:
    """Returns what this rank holds of a parameter: its shard, or all of it; writing to it writes to the parameter."""
    from torch.distributed.tensor import DTensor

    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def load_whole(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads a state dict of whole tensors into a model that may be sharded."""
    if not sharded_parts(module):
        module.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True))
