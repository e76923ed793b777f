"""One drawing: load a saved run -> draw images, batch by batch -> samples/drawn-N.png, .npz and .json."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor

from callbacks.pictures import plot_samples, what_means_are
from diffusion.samplers import check_moves
from evaluation.begin import build_fabric, check_groups, check_kinds, open_run, place, say
from evaluation.progress import progress
from evaluation.saved import SavedRun
from lightning_modules import DDPMLightningModule, LikelihoodModule
from losses.draws import mix
from runs.build import SettingError, build_part, plain
from runs.directory import first_free, one_writer, whole, write_json, write_picture
from runs.names import check_names
from runs.report import versions
from runs.speech import quiet_libraries

SHOWN = 64  # images in the picture


def run(cfg: DictConfig) -> tuple[Path | None, bool]:
    """Draws what ``cfg`` describes.

    Returns:
        (the file of all images; whether Ctrl-C cut it short).

    Raises:
        SettingError: for a setting that cannot work, before anything is drawn.
    """
    quiet_libraries()
    check_names(cfg, "sample")
    check_groups(cfg, "fabric")
    check_kinds(cfg, {"num": 1, "batch_size": 1, "seed": 0}, ("mean",))
    saved = open_run(cfg)
    (weights,) = saved.choose(cfg.weights, several=False)
    fabric = build_fabric(cfg.fabric, adds_up=False)
    model = saved.model()
    choose_sampler(cfg, model)
    saved.load(model, weights)
    fabric.launch()
    model = place(model, fabric, cfg.fabric)
    mean = cfg.mean and model.levels is not None
    started = time.monotonic()
    with progress("images", cfg.num, quiet=not fabric.is_global_zero) as done:
        images, interrupted = draw(model, cfg.num, cfg.batch_size, cfg.seed, mean, fabric, done)
    if not len(images):
        raise SettingError("interrupted before a batch of images was drawn: nothing to keep")
    path = None
    if fabric.is_global_zero:
        record = {
            "num": len(images),
            "interrupted": interrupted,
            "weights": weights,
            "checkpoint": str(saved.path),
            "step": saved.content.get("global_step"),
            "mean": mean,
            "levels": model.levels,
            **calls(model),
            "settings": plain(cfg),
            "devices": fabric.world_size,
            "seconds": round(time.monotonic() - started, 2),
            "versions": versions(),
        }
        path = keep(saved, images, model, record)
        say(fabric, f"{'interrupted: ' * interrupted}{len(images)} images, {weights} weights, step {record['step']}")
        say(fabric, f"wrote {path}, .png and .json")
    return path, interrupted


def choose_sampler(cfg: DictConfig, model: LikelihoodModule) -> None:
    """Gives a DDPM the sampler that ``cfg`` chooses, if it chooses one.

    Raises:
        SettingError: if the model has no use for it, or it does not lead from T to 1.
    """
    if cfg.get("sampler") is None:
        return
    check_groups(cfg, "sampler")
    if "_target_" not in cfg.sampler:
        raise SettingError(f"sampler.{next(iter(cfg.sampler))}= is a setting of a sampler: choose one too, as in sampler=ddim")
    if not isinstance(model, DDPMLightningModule):
        raise SettingError(
            f"sampler={cfg.sampler._target_.split('.')[-1]} is for DDPM, but this run is a {type(model).__name__}"
        )
    model.sampler = build_part(cfg.sampler)
    try:
        check_moves(model.sampler(model.process), model.num_steps)
    except ValueError as error:
        raise SettingError(str(error).replace("model.sampler", "sampler")) from None


def calls(model: LikelihoodModule) -> dict[str, Any]:
    """Returns what an image costs, of models whose images take several network calls."""
    if not isinstance(model, DDPMLightningModule):
        return {}
    return {"network_calls_per_image": len(model.sampler(model.process)) + 1, "num_steps": model.num_steps}


def draw(
    model: LikelihoodModule,
    num: int,
    batch_size: int,
    seed: int,
    mean: bool,
    fabric: Fabric,
    done: Callable[[int], None] = lambda _: None,
) -> tuple[Tensor, bool]:
    """Draws images in batches that the ranks share; which images they are does not depend on the number of ranks.

    Args:
        model: on its device.
        num: images in all.
        batch_size: of each batch; the randomness of a batch follows from ``seed`` and its place.
        seed: of all.
        mean: see :meth:`lightning_modules.base.LikelihoodModule.sample`.
        fabric: says which rank this is, and in which precision.
        done: told how many images were finished, over all ranks as far as this one can know.

    Returns:
        (images (num, C, H, W) on the CPU, on every rank; whether Ctrl-C cut it short, which leaves those of this rank).

    Raises:
        SettingError: if memory does not hold the images.
    """
    dtype = model.likelihood_dtype if model.levels is None else torch.uint8
    try:
        images = torch.zeros(num, *model.image_shape, dtype=dtype)
    except (RuntimeError, TypeError):  # of a number that torch cannot hold
        raise SettingError(f"num={num}: memory does not hold so many images of {list(model.image_shape)}; draw fewer") from None
    finished = torch.zeros(num, dtype=torch.bool)
    try:
        for start in range(fabric.global_rank * batch_size, num, fabric.world_size * batch_size):
            stop = min(num, start + batch_size)
            torch.manual_seed(mix(seed, "sample", start))
            with torch.inference_mode(), fabric.autocast():
                images[start:stop] = model.sample(stop - start, mean=mean).cpu()
            finished[start:stop] = True
            done(min(num, (stop - start) * fabric.world_size))
    except KeyboardInterrupt:
        return images[finished], True
    if fabric.world_size > 1:
        images = fabric.all_reduce(images.to(fabric.device), reduce_op="sum").cpu()  # each was drawn on one rank
    return images, False


def keep(saved: SavedRun, images: Tensor, model: LikelihoodModule, record: dict[str, Any]) -> Path:
    """Writes the images (N, C, H, W), a picture of the first, and the record.

    As ``arr_0``, (N, H, W, C), which is what tools for FID read.

    Returns:
        the file of all images. Earlier drawings are kept: a new one has the next free number.
    """
    folder = saved.directory / "samples"
    with one_writer(folder):
        number = first_free(lambda number: any(folder.glob(f"drawn-{number}.*")))
        path = folder / f"drawn-{number}.npz"
        with whole(path) as draft, draft.open("wb") as file:
            np.savez(file, arr_0=images.permute(0, 2, 3, 1).contiguous().numpy())
    kind = f"{what_means_are(model.levels) if record['mean'] else 'draws of'} p(x | z₁)"
    some = f"{SHOWN} of {len(images)}" if len(images) > SHOWN else f"{len(images)}"
    took = f", {record['network_calls_per_image']} network calls each" if "network_calls_per_image" in record else ""
    figure = plot_samples(images[:SHOWN], model.levels, f"{some} samples: {kind} after {record['step']} steps{took}")
    write_picture(path.with_suffix(".png"), figure)
    write_json(path.with_suffix(".json"), record)
    return path
