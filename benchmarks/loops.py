"""Loops around a network that is given: the exact sum over T, sampling, evaluation."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from benchmarks.paired import Row, in_turns, timed
from benchmarks.small_unets import small_ddpm
from diffusion import Epsilon, ancestral, cosine, ddim, linear
from diffusion.samplers import Move
from evaluation.rows import Rows, gather
from lightning_modules import DDPMLightningModule
from networks import UNet

CALLS = 100  # of a step in one turn
DIGITS = partial(UNet, base_channels=32, channel_multipliers=(1, 2), num_res_blocks=2, attention_resolutions=(4,))


def exact_sum(rounds: int, checkout: Path | None) -> list[Row]:
    """All T = 1000 steps of one image and of eight, against improved-diffusion's ``calc_bpd_loop`` with the same network."""
    if checkout is None:
        raise ModuleNotFoundError("give --improved-diffusion=<checkout of openai/improved-diffusion>")
    sys.path.insert(0, str(checkout))
    from improved_diffusion import gaussian_diffusion as theirs

    shape = (1, 8, 8)
    model = DDPMLightningModule(DIGITS, linear, 1000, Epsilon(), image_shape=shape, levels=256).eval()
    chain = theirs.GaussianDiffusion(
        betas=linear(1000).numpy(), model_mean_type=theirs.ModelMeanType.EPSILON,
        model_var_type=theirs.ModelVarType.FIXED_SMALL, loss_type=theirs.LossType.MSE,
    )  # fmt: skip
    rows = []
    for batch, target in ((1, 6), (8, 1.8)):
        x = torch.randint(256, (batch, *shape), dtype=torch.uint8)
        with torch.inference_mode():
            pairs = in_turns(
                partial(model.elbo, x),
                partial(chain.calc_bpd_loop, lambda x_t, t: model.network(x_t, t + 1), model.to_unit(x)),
                rounds,
            )
        name = f"exact sum over T = 1000, U-Net at 1x8x8, batch {batch}"
        rows.append(pairs.row(name, "calc_bpd_loop of improved-diffusion", target, False, "{ours} and {theirs} ms"))
    return rows


class Free(nn.Module):
    """A network that costs nothing: always the same output for a batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, Tensor] = {}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns noise that was drawn once."""
        if len(x) not in self.outputs:
            self.outputs[len(x)] = torch.randn_like(x)
        return self.outputs[len(x)]


def outside(rounds: int) -> list[Row]:
    """Time that sampling and evaluation spend outside the network: the same loops around one that costs nothing."""
    model, free = small_ddpm().eval(), small_ddpm().eval()
    free.network = Free()
    for each in (model, free):
        each.process = type(each.process)(cosine(20))  # few steps: each is like the others
    rows = Rows.of_split(torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), 8, 1, 0, "benchmark")
    fabric = Fabric(accelerator="cpu", devices=1)

    def sample(of: DDPMLightningModule) -> Callable[[], object]:
        return torch.inference_mode()(partial(of.sample, 8))

    def evaluate(of: DDPMLightningModule) -> Callable[[], object]:
        return lambda: gather(rows, lambda x: of.elbo(x).value.unsqueeze(1), 1, fabric, 256)

    found = []
    for what, loop in (("sampling", sample), ("evaluation", evaluate)):
        pairs = in_turns(loop(free), loop(model), rounds)
        name = f"{what}, time outside the network, U-Net at 3x32x32"
        found.append(pairs.row(name, "the whole loop", 0.03, True, "{ours} and {theirs} ms, T = 20, 8 images"))
    return found


def sampler_step(rounds: int) -> list[Row]:
    """One step around a given prediction of the noise, x̂_0 clamped, against diffusers' schedulers; then torch.randn alone."""
    from diffusers import DDIMScheduler, DDPMScheduler

    process, epsilon = small_ddpm().process, Epsilon()
    schedulers = {"ancestral": DDPMScheduler(1000, clip_sample=True), "DDIM": DDIMScheduler(1000, clip_sample=True)}
    moves = {"ancestral": ancestral(process)[499], "DDIM": ddim(process)[25]}

    def ours(move: Move, x: Tensor, noise: Tensor) -> None:
        for _ in range(CALLS):
            move(epsilon.x0(noise, x, move.t, process), x, clip=True)

    def theirs(scheduler: DDPMScheduler | DDIMScheduler, x: Tensor, noise: Tensor) -> None:
        for _ in range(CALLS):
            _ = scheduler.step(noise, 500, x).prev_sample

    found = []
    for name, scheduler in schedulers.items():
        scheduler.set_timesteps(1000 if name == "ancestral" else 50)
        for shape in ((1, 3, 32, 32), (8, 3, 32, 32), (64, 3, 32, 32)):
            x, noise = torch.randn(shape), torch.randn(shape)
            with torch.inference_mode():
                pairs = in_turns(partial(ours, moves[name], x, noise), partial(theirs, scheduler, x, noise), rounds)
            text = "{ours} and {theirs} µs"
            if name == "ancestral":  # what a step cannot take less than
                seconds = statistics.median(
                    timed(lambda shape=shape: [torch.randn(shape) for _ in range(CALLS)]) for _ in range(rounds)
                )
                text += f", of which torch.randn {1e6 / CALLS * seconds:.4g}"
            label = f"{name} step, {'x'.join(map(str, shape))}"
            found.append(pairs.row(label, f"diffusers {type(scheduler).__name__}", 0.55, True, text, work=1e3 / CALLS))
    return found


def benches(checkout: Path | None) -> dict[str, Callable[[int], list[Row]]]:
    """Returns the comparisons by name."""
    return {"exact-sum": partial(exact_sum, checkout=checkout), "outside-network": outside, "sampler-step": sampler_step}
