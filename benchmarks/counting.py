"""What a computation takes, counted from its traced operations: FLOPs, bytes moved, launches, bytes kept for the backward pass.

On the ``meta`` device nothing is computed, so a batch of any size is counted in a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry


@dataclass(frozen=True)
class Work:
    """What a computation takes on a device.

    Attributes:
        flops: of matrix products and convolutions; a multiplication and an addition are two.
        bytes_moved: what all other operations read and write, in the precision that was traced.
        launches: operations that are not mere views; one kernel each, at least.
        operands: tensors that go into the products: what autocast casts.
    """

    flops: int
    bytes_moved: int
    launches: int
    operands: int

    def __add__(self, other: Work) -> Work:
        """Returns both, one after the other."""
        return Work(
            self.flops + other.flops,
            self.bytes_moved + other.bytes_moved,
            self.launches + other.launches,
            self.operands + other.operands,
        )


class Tally(TorchDispatchMode):
    """Adds up the operations on one device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.bytes_moved = self.launches = self.operands = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs the operation, and counts it if it does any work on the device."""
        out = func(*args, **(kwargs or {}))
        given, made = self._here((args, kwargs)), self._here(out)
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        shares = any(tensor.untyped_storage()._cdata in storages for tensor in made)
        is_view = shares and not func._schema.is_mutable
        if not made or is_view or "empty" in func.overloadpacket.__name__:
            return out
        self.launches += 1
        if func.overloadpacket in flop_registry:
            self.operands += len(given)
        else:
            self.bytes_moved += sum(tensor.numel() * tensor.element_size() for tensor in (*given, *made))
        return out

    def _here(self, values: Any) -> list[Tensor]:
        tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        return [tensor for tensor in tensors if tensor.device.type == self.device.type]


def count(function: Callable[[], object], device: str = "meta") -> Work:
    """Counts one call, whose tensors are on ``device``."""
    with FlopCounterMode(display=False) as flops, Tally(device) as tally:
        function()
    return Work(flops.get_total_flops(), tally.bytes_moved, tally.launches, tally.operands)


def saved_bytes(function: Callable[[], object], parameters: Iterable[nn.Parameter]) -> int:
    """Returns the bytes that autograd keeps for the backward pass of ``function``, each storage once, parameters left out."""
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, Tensor] = {}  # the tensors too: a storage that were freed could lend its address to another

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    total = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
    del result
    return total
