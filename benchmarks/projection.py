"""What training by the recipes would take on GPUs: ``python -m benchmarks.projection`` writes docs/projection.md.

Nothing here runs on a GPU: operations are counted on the ``meta`` device and held against data sheets.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.pages import bullet
from benchmarks.record import PAGES
from benchmarks.roofline import FAST, GPUS, SLOW, Assumed, Counted, Times, evaluate, project, traffic

STEPS = 800_000
DEVICES = (1, 8)
LARGE = 1024  # a batch for eight GPUs
ROWS = 512  # network calls of an evaluation in one batch
SAMPLES = 50_000  # what an FID is worked out from
ON_STREAM = ("model=ddpm", "data=stream", f"trainer.max_steps={STEPS}", "trainer.precision=bf16-mixed")
RECIPES = {  # images to train on and to test on, command
    "CIFAR-10": (50_000, 10_000, ("experiment=ddpm_cifar10",)),
    "ImageNet-32": (1_281_167, 50_000, (*ON_STREAM, "trainer.max_epochs=-1", "callbacks.ema.decay=0.9999")),
}
# Ho et al. (2020), appendix B: 21 steps/s of 128 images on a TPU v3-8, whose four chips have 123 TFLOP/s each (Google's page)
HO_STEPS, HO_BATCH, TPU = 21, 128, 4 * 123e12


def span(low: float, high: float) -> str:
    """Returns two figures, or one where they look alike."""
    first, second = f"{low:,.3g}", f"{high:,.3g}"
    first, second = (f"{float(text.replace(',', '')):,.10g}" for text in (first, second))
    return first if first == second else f"{first}–{second}"


def both(function: Callable[[Assumed], float], scale: float = 1.0) -> str:
    """Returns a figure at both ends of what is assumed."""
    return span(*sorted(scale * function(assumed) for assumed in (FAST, SLOW)))


def duration(function: Callable[[Assumed], float]) -> str:
    """Returns seconds at both ends in the unit that suits the longer one."""
    longest = max(function(assumed) for assumed in (FAST, SLOW))
    unit, name = next((size, name) for size, name in ((3600, "h"), (60, "min"), (1, "s")) if longest >= size or size == 1)
    return f"{both(function, 1 / unit)} {name}"


def sheet() -> list[str]:
    """Returns the table of data sheets and the one of assumptions."""
    lines = [
        "| NVIDIA's data sheets, dense | bf16 TFLOP/s | TF32 TFLOP/s | memory | bandwidth, GB/s | NVLink, GB/s each way |",
        "|---|---|---|---|---|---|",
    ]
    for gpu in GPUS:
        lines.append(
            f"| {gpu.name} | {gpu.bf16 / 1e12:.0f} | {gpu.tf32 / 1e12:.0f} | {gpu.memory / 1e9:.0f} GB | "
            f"{gpu.bandwidth / 1e9:,.0f} | {gpu.link / 1e9:.0f} |"
        )
    named = {
        "products and convolutions reach, of the bf16 peak": lambda a: f"{a.utilisation:.0%}",
        "the other operations move, of what they move in float32": lambda a: f"{a.narrow:.0%}",
        "bandwidth reached, of the data sheet's": lambda a: f"{a.bandwidth:.0%}",
        "NVLink reached by the all-reduce": lambda a: f"{a.link:.0%}",
        "launches of autocast for each tensor that enters a product": lambda a: f"{a.casts:g}",
        "microseconds a launch": lambda a: f"{1e6 * a.launch:g}",
        "images/s read by a rank (docs/data.md, two CPU cores)": lambda a: f"{a.fetch:,}",
    }
    lines += ["", "| assumed, not measured | fast | slow |", "|---|---|---|"]
    return lines + [f"| {name} | {show(FAST)} | {show(SLOW)} |" for name, show in named.items()]


def counts(recipe: Counted) -> list[str]:
    """Returns the table of what was counted."""
    lines = ["| counted | " + " | ".join(f"{d} GPU{'s' * (d > 1)}" for d in DEVICES) + " |", "|---|" + "---|" * len(DEVICES)]
    works = {devices: recipe.step(recipe.batch // devices, recipe.batch) for devices in DEVICES}

    def row(name: str, show: Callable[[int], str]) -> None:
        lines.append(f"| {name} | " + " | ".join(show(devices) for devices in DEVICES) + " |")

    row("images a step on each", lambda d: f"{recipe.batch // d}")
    row("TFLOP a step on each, forward and backward", lambda d: f"{works[d].flops / 1e12:.3g}")
    row("GB that all other operations move, in float32", lambda d: f"{works[d].bytes_moved / 1e9:.3g}")
    row("GB that clipping, Adam and the average move besides", lambda d: f"{recipe.update() / 1e9:.3g}")
    row("launches, and tensors that autocast may cast", lambda d: f"{works[d].launches:,} + {works[d].operands:,}")
    row("MB sent by each in the all-reduce", lambda d: f"{traffic(recipe.parameters, d) / 1e6:,.0f}")
    row("GB of parameters, gradients, moments, average", lambda d: f"{recipe.state() / 1e9:.3g}")
    row(
        "GB kept for the backward pass, bfloat16–float32",
        lambda d: both(lambda a: recipe.batch // d * recipe.saved * a.narrow, 1e-9),
    )
    return lines


def projection(recipe: Counted, batches: dict[int, int]) -> list[str]:
    """Returns the table of times: {devices: batch of all together}."""
    lines = [
        "| GPUs | batch | FLOPs, ms | bandwidth, ms | launches, ms | all-reduce, ms | step, ms | images/s "
        f"| {STEPS:,} steps, hours | memory, GB each | limit |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for gpu in GPUS:
        for devices, batch in batches.items():
            times = [project(recipe, gpu, devices, assumed, batch) for assumed in (FAST, SLOW)]
            parts = " | ".join(_ms(times, part) for part in ("flops", "bandwidth", "launches", "all_reduce", "step"))
            speeds = span(*sorted(batch / time.step for time in times))
            hours = span(*(STEPS * time.step / 3600 for time in times))
            memory = both(lambda a, rows=batch // devices: recipe.memory(rows, a), 1e-9)
            limits = " or ".join(dict.fromkeys(time.limit for time in times))
            lines.append(f"| {devices} × {gpu.name} | {batch} | {parts} | {speeds} | {hours} | {memory} | {limits} |")
    return lines


def _ms(times: list[Times], part: str) -> str:
    return span(*(1e3 * getattr(time, part) for time in times))


def evaluations(recipe: Counted, images: int) -> list[str]:
    """Returns the table of what evaluation and sampling take."""
    lines = ["| | network calls | " + " | ".join(f"{d} × {gpu.name}" for gpu in GPUS for d in DEVICES) + " |"]
    lines.append("|---|---|" + "---|" * len(GPUS) * len(DEVICES))
    jobs = {
        f"exact sum, {images:,} test images": (recipe.num_steps, images),
        f"importance, {images:,} test images": (recipe.calls, images),
        f"{SAMPLES:,} samples": (recipe.num_steps, SAMPLES),
    }
    for name, (calls, num) in jobs.items():
        cells = [
            duration(lambda a, gpu=gpu, d=d, calls=calls, num=num: evaluate(recipe, gpu, d, a, calls, num, ROWS))
            for gpu in GPUS
            for d in DEVICES
        ]
        lines.append(f"| {name} | {calls:,} × {num:,} | " + " | ".join(cells) + " |")
    return lines


def checks(recipe: Counted) -> list[str]:
    """Returns what speaks for the counts and for the assumed utilisation."""
    forward, step = recipe.call(1).flops, recipe.step(1, 1).flops
    achieved = HO_STEPS * HO_BATCH * step
    return [
        bullet(
            f"One call of the network is {forward / 1e9:.4g} GFLOP an image ({forward / 2e9:.3g} G multiply-adds), a step "
            f"{step / forward:.3g} times that. Published for this network: 6.1 G multiply-adds (Fang et al. 2023, "
            '"Structural pruning for diffusion models"). Two things differ: such counters leave the products of attention '
            "out, and take the doubling convolutions as they are written, with 36 products where 16 do here. A test adds "
            "the layers up by formula, both ways."
        ),
        bullet(
            f"Ho et al. (2020) report {HO_STEPS} steps/s of {HO_BATCH} images on a TPU v3-8: {achieved / 1e12:.0f} TFLOP/s by "
            f"this count, {achieved / TPU:.0%} of its peak of {TPU / 1e12:.0f}, for the whole step."
        ),
    ]


def limits(recipe: Counted) -> list[str]:
    """Returns in words what limits each case."""
    first, last, many = GPUS[0], GPUS[-1], DEVICES[-1]
    alone, shared = (project(recipe, last, devices, FAST) for devices in DEVICES)
    large = project(recipe, last, many, FAST, LARGE)
    need = max(LARGE / large.step, recipe.batch / shared.step)
    gains = sorted(
        project(recipe, gpu, 1, assumed).step / project(recipe, gpu, many, assumed).step
        for gpu in GPUS
        for assumed in (FAST, SLOW)
    )
    fits = int((0.9 * first.memory - recipe.state()) / recipe.saved)
    points = [
        f"**One GPU**: products ({1e3 * alone.flops:.2g} of {1e3 * alone.step:.2g} ms at the fast end of an {last.name}), then "
        f"normalisation, elementwise operations and copies ({1e3 * alone.bandwidth:.2g} ms), which `compile=true` fuses. The "
        "more of its peak a GPU reaches in products, the more bandwidth counts.",
        f"**{many} GPUs, the recipe's batch**: {recipe.batch // many} images on each are few. Launching takes the host "
        f"{1e3 * shared.launches:.2g} ms a step or more, when an {last.name} may be done in "
        f"{1e3 * (shared.flops + shared.bandwidth):.2g}; clipping, Adam and the average do not shrink with the rows, nor do "
        "the random numbers, which each rank draws for the whole batch so that N devices see what one sees. "
        f"So {many} GPUs are {span(gains[0], gains[-1])} times as fast as one, less if products on so few images reach less of "
        "the peak than assumed. `compile=true` launches fewer kernels and CUDA graphs (inductor's; not tried here) one. "
        f"A batch of {LARGE} would keep {many} GPUs busy, but is another recipe.",
        f"**All-reduce**: {traffic(recipe.parameters, many) / 1e6:,.0f} MB a step from each, {1e3 * shared.all_reduce:.2g} "
        "ms or more by NVLink, while the backward pass goes on. Within a node it limits nothing; over a network ten times "
        "slower it would.",
        f"**Data**: at most {need:,.0f} images/s are asked for, {need * recipe.num_dims / 1e6:,.0f} MB/s as bytes, by all "
        f"ranks together, and each rank reads {SLOW.fetch:,} or more, given a core or two of its own. CIFAR-10 is resident.",
        f"**Memory** limits nothing: about {fits:,} images at once fit into nine tenths of {first.memory / 1e9:.0f} GB even in "
        "float32, so neither `trainer=fsdp` nor `checkpoint_activations` is called for.",
        "**Evaluation**: FLOPs, as the calls of many images and steps share a batch. The exact sum costs "
        f"{recipe.num_steps / recipe.calls:.3g} times what importance costs: it belongs to the end of a run. Samples cost as "
        "much as the exact sum, image for image.",
        "**TF32** (`trainer.precision=32-true trainer.float32_matmul_precision=high`): products take twice as long.",
        "**Not counted**: the trainer's own time on the host, validation, checkpoints, pictures, and compiling.",
    ]
    return [bullet(point) for point in points]


def release() -> str:
    """Returns PyTorch's version, without how it was built."""
    return torch.__version__.split("+")[0]


INTRODUCTION = """# Projection to GPUs

Written by `python -m benchmarks.projection`. **None of this has been run on a GPU.** The operations of one training step are
traced on PyTorch's `meta` device in float32: FLOPs of products and convolutions; bytes that all other operations read and
write, nothing fused, no help from caches; launches, one for each operation, though some are two or three kernels (the few
dozen of the fused optimiser and the average are left out); bytes kept for the backward pass. Then

    device = FLOPs / (utilisation · peak) + bytes / (share · bandwidth)
    step   = the longest of device, launches, all-reduce, data

as launches run ahead of the device, gradients travel during the backward pass, and batches are fetched ahead. A range runs
from the fast to the slow end of what is assumed, and what is assumed is the weaker half of every figure.
"""


def document(recipes: list[Counted]) -> str:
    """Returns docs/projection.md."""
    traced = f"Traced with PyTorch {release()}: another one may split the same step into other operations."
    text = [INTRODUCTION, traced, "", *sheet(), "", "## Checks", "", *checks(recipes[0])]
    same = len({(recipe.batch, recipe.parameters, recipe.step(2, 2), recipe.call(2)) for recipe in recipes}) == 1
    for group in [recipes] if same else [[recipe] for recipe in recipes]:
        text += ["", f"## {' and '.join(recipe.name for recipe in group)}: training", ""]
        text += [bullet(f"{r.name}: `{r.command}`; {STEPS:,} steps are {_epochs(r):,.0f} epochs") for r in group]
        first, large = group[0], {DEVICES[-1]: LARGE}
        if len(group) > 1:
            text += ["", f"One network ({first.parameters:,} parameters) and one batch ({first.batch}): the step is the same."]
        text += ["", "With `trainer=gpu` on one GPU and `trainer=ddp` on several."]
        text += ["", *counts(first), "", *projection(first, dict.fromkeys(DEVICES, first.batch))]
        text += ["", f"With {LARGE} images on {DEVICES[-1]} GPUs, which is not the recipe:", "", *projection(first, large)]
    for recipe in recipes:
        text += ["", f"## {recipe.name}: evaluation and sampling", "", *evaluations(recipe, RECIPES[recipe.name][1])]
    return "\n".join([*text, "", "## What would limit it", "", *limits(recipes[0]), ""])


def page() -> str:
    """Counts the recipes, and returns docs/projection.md."""
    return document([Counted.of(name, *overrides) for name, (_, _, overrides) in RECIPES.items()])


def _epochs(recipe: Counted) -> float:
    return STEPS / ((RECIPES[recipe.name][0] - recipe.held_out) // recipe.batch)  # of whole batches


def main() -> None:
    """Counts, projects and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.projection", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PAGES, help="folder of projection.md")
    settings = parser.parse_args()
    text = page()
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "projection.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
