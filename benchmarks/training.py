"""What the framework costs while it trains: with everything on, against raw loops; bf16; memory."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.jobs import Job, Turns
from benchmarks.memory import resident_peak
from benchmarks.paired import Pairs, Row, in_turns
from benchmarks.small_unets import RandomPictures, small_ddpm
from losses.elbo import nats_to_bits_per_dim

VAE_STEPS = 55  # of a turn: five epochs of digits, so that every turn has its checkpoints
UNET_STEPS, UNET_BATCH = 4, 16
STEP = "{ours} and {theirs} ms a step"
FOR_UNET = ("model=ddpm", "data=cifar10", "trainer.check_val_every_n_epoch=1")


def vae_step(rounds: int) -> list[Row]:
    """The small VAE on digits, step by step."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job.build(Path(folder), "model=vae", f"trainer.max_epochs={5 * (rounds + 2) + 1}")
        turns = Turns(job.raw_loop(Job.build(Path(folder), "model=vae").model), VAE_STEPS)
        job.run(turns)
    return [turns.pairs().row("training step, VAE on digits, everything on", "raw loop", 1.5, True, STEP)]


def unet_step(rounds: int) -> list[Row]:
    """The small U-Net on 3x32x32, step by step; metrics are logged and checkpoints written every 20 steps, which is often."""
    rounds = 3 * rounds  # what is looked for is smaller than the noise of a turn
    with tempfile.TemporaryDirectory() as folder:
        data = RandomPictures(20 * UNET_BATCH, UNET_BATCH)
        epochs = f"trainer.max_epochs={(rounds + 2) * UNET_STEPS // 20 + 1}"
        job = Job.build(Path(folder), *FOR_UNET, epochs, data=data, model=small_ddpm())
        turns = Turns(job.raw_loop(small_ddpm()), UNET_STEPS)
        job.run(turns)
    return [turns.pairs().row("training step, U-Net at 3x32x32, everything on", "raw loop", 1.03, True, STEP)]


def bf16(rounds: int) -> list[Row]:
    """bf16-mixed against float32, and the bound of both after the same steps."""
    data = RandomPictures(2048, UNET_BATCH)
    models, steppers = {}, {}
    for name in ("bf16", "float32"):
        torch.manual_seed(0)
        models[name] = small_ddpm(64, dropout=0.0)
        steppers[name] = _stepper(models[name], data, name == "bf16")
    pairs = in_turns(steppers["bf16"], steppers["float32"], 3 * rounds)
    figures = {}
    for name, model in models.items():
        torch.manual_seed(1)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
            nats = model.eval().elbo(data.splits["test"], 100).value.mean()
        figures[name] = nats_to_bits_per_dim(-nats.item(), model.num_dims)
    text = f"{STEP}; {figures['bf16']:.4f} and {figures['float32']:.4f} bits/dim after the same steps"
    return [pairs.row("training step, U-Net in bf16-mixed", "float32", 1.4, False, text)]


def _stepper(model, data: RandomPictures, narrow: bool):
    """Returns one optimiser step with noise that depends on the step alone."""
    optimizer = model.train().optimizer_factory(model.parameters())
    count = 0

    def step() -> None:
        nonlocal count
        torch.manual_seed(count)
        x = data.splits["train"][torch.randint(data.num, (UNET_BATCH,))]
        count += 1
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss, _ = model.objective(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def memory(rounds: int) -> list[Row]:
    """Peak memory of a process that trains the U-Net, with everything on and in a raw loop; both import the same.

    The C library is told to give back what is freed: the peak is then that of what is held at once. Left alone, both take a
    third more, and how their heaps happen to be cut up moves the ratio by a tenth.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    ours, theirs = [], []
    for _ in range(rounds):
        for kind, into in (("trainer", ours), ("raw", theirs)):
            command = [sys.executable, "-m", "benchmarks.training", kind]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            into.append(float(done.stdout.split()[-1]) / 1e3)
    text = "{ours} and {theirs} MiB at the peak, above what the imports take"
    return [Pairs(ours, theirs).row("memory of a training step, U-Net, batch 64", "raw loop", 1.05, True, text)]


def _peak_memory(kind: str) -> float:
    """Returns the peak of this process in MiB above what stood before data and model were made."""
    importlib.import_module("wandb")  # which the trainer would load late
    before = resident_peak()
    with tempfile.TemporaryDirectory() as folder:
        data = RandomPictures(4 * 64, 64)
        job = Job.build(Path(folder), *FOR_UNET, "trainer.max_epochs=1", data=data, model=small_ddpm())
        if kind == "raw":
            job.raw_loop(job.model)(4)
        else:
            job.run()
    return resident_peak() - before


if __name__ == "__main__":
    print(_peak_memory(sys.argv[1]))
