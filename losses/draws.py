"""Random numbers for a batch that several ranks share, or whose rows each have their own.

A rank of N holds some rows of the global batch. It draws for the whole batch and keeps its own rows, so N devices that
start from one seed see exactly the noise that one device sees, and no two ranks see the same. On one device, and
outside of :func:`rows_of_global_batch`, these functions are torch's own.

In :func:`own_generators` every row draws from a generator of its own: what a row sees then depends neither on the rows
beside it nor on how many there are, so an evaluation gives one figure however it is cut into batches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


def mix(*parts: object) -> int:
    """Returns 63 bits that differ for any two different sequences of parts; torch's CPU generator is seeded by 32 of them."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def seeded(*parts: object) -> torch.Generator:
    """Returns a generator of its own for every key, as in ``seeded(seed, epoch, batch_index, "flip")``."""
    return torch.Generator().manual_seed(mix(*parts))


@dataclass(frozen=True)
class Rows:
    """This rank's tensors are rows ``start`` to ``stop`` (exclusive) of a global batch of ``total``."""

    start: int
    stop: int
    total: int


@dataclass(frozen=True)
class Own:
    """Generators on the CPU, one for each row, and what returns the numbers in [0, 1) of :func:`stratified`: () -> (B,)."""

    generators: Sequence[torch.Generator]
    cells: Callable[[], Tensor]  # few models ask for them


_rows: Rows | None = None
_own: Own | None = None


@contextmanager
def rows_of_global_batch(rows: Rows | None) -> Iterator[None]:
    """Inside the block, draws are this rank's rows of draws for the global batch; ``None`` means all of them."""
    before = set_rows(rows)
    try:
        yield
    finally:
        set_rows(before)


def set_rows(rows: Rows | None) -> Rows | None:
    """Sets the rows for all draws to come and returns what was set before (for hooks, which cannot hold a block open)."""
    global _rows
    before, _rows = _rows, rows
    return before


@contextmanager
def own_generators(own: Own) -> Iterator[None]:
    """Inside the block, row i of every draw of B rows comes from generator i; of k·B rows, rows i·k to (i + 1)·k do."""
    global _own
    before, _own = _own, own
    try:
        yield
    finally:
        _own = before


def _row_by_row(fill: Callable[[Tensor, torch.Generator], object], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Fills each row by its own generator, one row at a time, since torch fills blocks by an order of its own."""
    out = torch.empty(shape, dtype=dtype)
    k, rest = divmod(shape[0], len(_own.generators))
    if rest:
        raise ValueError(f"{shape[0]} rows cannot be shared by {len(_own.generators)} generators")
    for index, row in enumerate(out):
        fill(row, _own.generators[index // k])
    return out


def _cut() -> bool:
    return _rows is not None and _rows.stop - _rows.start < _rows.total


def _own_rows(draw: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...]) -> Tensor:
    if not _cut():
        return draw(shape)
    # k entries of one example lie together (several steps of one image in one network batch), in the global batch too
    own = _rows.stop - _rows.start
    k = -(-shape[0] // max(own, 1))  # not divmod, at which torch.compile breaks the graph; rounded up for a part of the rows
    return draw((k * _rows.total, *shape[1:]))[k * _rows.start :][: shape[0]]


def global_batch(batch: int) -> int:
    """Returns the size of the global batch that this rank's ``batch`` examples belong to."""
    return batch if _rows is None or batch != _rows.stop - _rows.start else _rows.total


def randn_like(x: Tensor) -> Tensor:
    """Draws N(0, 1) with the shape, dtype and device of ``x`` (B, *)."""
    if _own is not None:
        return _row_by_row(lambda row, generator: row.normal_(generator=generator), tuple(x.shape), x.dtype).to(x.device)
    drawn = _own_rows(lambda shape: torch.randn(shape, dtype=x.dtype, device=x.device), tuple(x.shape))
    return drawn.clone() if _cut() else drawn  # what is kept for the backward pass would else hold the whole batch's


def rand(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draws U[0, 1) of ``shape`` (B, *)."""
    if _own is not None:
        return _row_by_row(lambda row, generator: row.uniform_(generator=generator), shape, dtype).to(device)
    return _own_rows(lambda full: torch.rand(full, dtype=dtype, device=device), shape)


def dropout(x: Tensor, p: float) -> Tensor:
    """Zeroes every entry of ``x`` (B, *) with probability p in [0, 1) and scales the others by 1/(1 - p).

    Four entries of the mask come from one 64-bit number, several times as fast as ``bernoulli_`` on a CPU. So the probability
    is p rounded to a multiple of 2^-16, and the scale is that one's, so the mean is ``x``. Not by :func:`own_generators`:
    an evaluation drops nothing.
    """
    dropped = min(round(p * 2**16), 2**16 - 1)

    # integers whatever x is, so that the mask does not depend on the precision of the run
    def keep(shape: tuple[int, ...]) -> Tensor:
        num = math.prod(shape)
        # not random_, which is a little faster, but torch.compile breaks the graph at it
        bits = torch.randint(-(2**63), 2**63 - 1, ((num + 3) // 4,), dtype=torch.int64, device=x.device)
        return bits.view(torch.int16)[:num].view(shape)

    kept, scale = (_own_rows(keep, tuple(x.shape)) >= dropped - 2**15).to(x.dtype), 2**16 / (2**16 - dropped)
    # a float mask multiplies fastest; one of 8 or 11 bits does not hold the scale, but products are rounded without bias
    return x * kept.mul_(scale) if x.dtype.itemsize > 2 else x * kept * scale


def stratified(batch: int, device: torch.device) -> Tensor:
    """Draws ``batch`` numbers, evenly spread over [0, 1) and each of them U[0, 1): (B,) float64.

    One uniform shift for the whole global batch, modulo 1 (Kingma et al. 2021, "Variational Diffusion Models", appendix
    I.1). Without the modulo, row i would only ever see the i-th part of [0, 1).
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if _own is not None:
        return _own.cells().to(device, dtype)

    def draw(shape: tuple[int, ...]) -> Tensor:
        spread = torch.arange(shape[0], dtype=dtype, device=device) / shape[0]
        return (torch.rand((), dtype=dtype, device=device) + spread) % 1

    return _own_rows(draw, (batch,))
