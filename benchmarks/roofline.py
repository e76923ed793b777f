"""A recipe's training step, traced on the ``meta`` device, and what it needs held against GPUs' data sheets.

    device time = FLOPs / (utilisation · peak) + bytes of the other operations / (share · bandwidth)
    step = max(device time, launches · seconds a launch, all-reduce, data)

The host launches while the device computes, gradients travel while the backward pass goes on, and batches are fetched ahead.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from benchmarks.counting import Work, count, saved_bytes
from benchmarks.jobs import configure
from lightning_modules import DDPMLightningModule
from losses.draws import Rows, rows_of_global_batch
from runs.build import build_part


@dataclass(frozen=True)
class GPU:
    """What the vendor's data sheet says, without sparsity.

    Attributes:
        bf16, tf32: FLOP/s of the tensor cores.
        bandwidth: of the memory, bytes/s.
        link: of NVLink, bytes/s in one direction: half of what the sheet gives.
        memory: bytes.
    """

    name: str
    bf16: float
    tf32: float
    bandwidth: float
    link: float
    memory: float


GPUS = (
    GPU("A100 80GB SXM", 312e12, 156e12, 2.039e12, 300e9, 80e9),
    GPU("H100 SXM", 989e12, 494e12, 3.35e12, 450e9, 80e9),
)


@dataclass(frozen=True)
class Assumed:
    """What is not counted but assumed, at one end of the range.

    Attributes:
        utilisation: of the peak, by products and convolutions.
        narrow: bytes that other operations move, as a share of what they move in float32: 1/2 if all were bfloat16.
        casts: launches of autocast for each tensor that goes into a product.
        bandwidth, link: share of the data sheet's that is reached.
        launch: seconds a launch.
        fetch: images/s that one rank's data loading delivers: docs/data.md, one worker, and in the training process.
    """

    utilisation: float
    narrow: float
    casts: float
    bandwidth: float
    link: float
    launch: float
    fetch: float


FAST = Assumed(0.4, 0.5, 0.0, 0.8, 0.8, 5e-6, 312_000)
SLOW = Assumed(0.2, 1.0, 1.0, 0.8, 0.5, 5e-6, 57_000)


@dataclass(frozen=True)
class Counted:
    """A recipe, counted.

    Attributes:
        batch: of all devices together.
        num_dims: D of one image, one byte each.
        held_out: images of the training set that validation takes.
        parameters: numbers that are trained.
        step: (rows on one device, rows of the global batch) -> forward and backward pass.
        call: rows -> one network call of an evaluation, with the step's KL.
        saved: bytes that one image keeps for the backward pass, in float32.
        num_steps, calls: T, and the network calls an image of the recipe's test.
    """

    name: str
    command: str
    batch: int
    num_dims: int
    held_out: int
    parameters: int
    step: Callable[[int, int], Work]
    call: Callable[[int], Work]
    saved: float
    num_steps: int
    calls: int

    @classmethod
    def of(cls, name: str, *overrides: str) -> Counted:
        """Composes a recipe and traces it."""
        with tempfile.TemporaryDirectory() as folder:
            cfg = configure(Path(folder), *overrides)
        model: DDPMLightningModule = build_part(cfg.model).to("meta")
        model.timestep_sampler = lambda num, steps, _: torch.full((num,), steps)  # t = 1 would add its few operations
        return cls(
            name=name,
            command=" ".join(["python train.py", *overrides]),
            batch=cfg.data.batch_size,
            num_dims=model.num_dims,
            held_out=cfg.data.num_val,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            step=cache(partial(count_step, model)),
            call=cache(partial(count_call, model)),
            saved=saved_bytes(lambda: model.train().objective(_images(model, 8)), model.parameters()) / 8,
            num_steps=model.num_steps,
            calls=model.calls["test"] or model.num_steps,
        )

    def state(self) -> int:
        """Bytes of parameters, gradients, Adam's two moments and the average, float32."""
        return 5 * 4 * self.parameters

    def update(self) -> int:
        """Bytes that clipping (three times the parameters), fused Adam (seven times) and the average (three) move, float32."""
        return (3 + 7 + 3) * 4 * self.parameters

    def memory(self, rows: int, assumed: Assumed) -> float:
        """Bytes in use at the end of the forward pass; autocast keeps the weights in bfloat16 too."""
        return self.state() + 2 * self.parameters + rows * self.saved * assumed.narrow


def _images(model: DDPMLightningModule, rows: int) -> torch.Tensor:
    return torch.empty((rows, *model.image_shape), dtype=torch.uint8, device="meta")


def count_step(model: DDPMLightningModule, rows: int, batch: int) -> Work:
    """Counts forward and backward pass of a device's rows of a batch: each draws noise and masks for the whole batch."""
    model.zero_grad()  # gradients of an earlier count would be added to
    with rows_of_global_batch(Rows(0, rows, batch)):
        return count(lambda: model.train().objective(_images(model, rows))[0].backward())


@torch.no_grad()
def count_call(model: DDPMLightningModule, rows: int) -> Work:
    """Counts one network call of an evaluation, with the KL."""
    x0, t = model.eval().to_unit(_images(model, rows)), torch.full((rows, 1), model.num_steps, device="meta")
    return count(lambda: model.step_draws(x0, t))


@dataclass(frozen=True)
class Times:
    """Seconds of one step, by what takes them."""

    flops: float
    bandwidth: float
    launches: float
    all_reduce: float
    data: float

    @property
    def step(self) -> float:
        """Seconds of the whole."""
        return max(self.flops + self.bandwidth, self.launches, self.all_reduce, self.data)

    @property
    def limit(self) -> str:
        """What limits it."""
        others = {"launches": self.launches, "all-reduce": self.all_reduce, "data": self.data}
        name = max(others, key=others.__getitem__)
        if others[name] > self.flops + self.bandwidth:
            return name
        return "FLOPs" if self.flops > self.bandwidth else "bandwidth"


def device_seconds(work: Work, extra_bytes: float, gpu: GPU, assumed: Assumed) -> tuple[float, float]:
    """Returns the seconds of the products and of everything else."""
    moved = (work.bytes_moved * assumed.narrow + extra_bytes) / (assumed.bandwidth * gpu.bandwidth)
    return work.flops / (assumed.utilisation * gpu.bf16), moved


def traffic(parameters: int, devices: int) -> float:
    """Bytes that each device sends in a ring all-reduce of float32 gradients."""
    return 2 * (devices - 1) / devices * 4 * parameters


def project(recipe: Counted, gpu: GPU, devices: int, assumed: Assumed, batch: int | None = None) -> Times:
    """Returns one training step's times; the batch is shared by the devices."""
    batch = batch or recipe.batch
    rows = batch // devices
    work = recipe.step(rows, batch)
    flops, bandwidth = device_seconds(work, recipe.update(), gpu, assumed)
    launches = assumed.launch * (work.launches + assumed.casts * work.operands)
    return Times(
        flops, bandwidth, launches, traffic(recipe.parameters, devices) / (assumed.link * gpu.link), rows / assumed.fetch
    )


def evaluate(recipe: Counted, gpu: GPU, devices: int, assumed: Assumed, calls: int, images: int, rows: int = 1024) -> float:
    """Returns the seconds of ``calls`` network calls for each image, ``rows`` of them together."""
    work = recipe.call(rows)
    seconds = max(sum(device_seconds(work, 0, gpu, assumed)), assumed.launch * (work.launches + assumed.casts * work.operands))
    return seconds * calls * images / rows / devices
