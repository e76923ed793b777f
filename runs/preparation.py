"""One preparation: look at everything -> write shards into a folder of its own -> manifest -> give the folder its name."""

from __future__ import annotations

import errno
import math
import os
import secrets
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf, open_dict
from tqdm import tqdm

from datamodules import GlobalBatchSampler, ImageDataModule
from datamodules.arrays import find_arrays
from datamodules.base import ImageBatches, ImageLoader
from datamodules.shards import Manifest, write_split
from runs.build import SettingError, build_part
from runs.commands import CONF, as_value
from runs.names import check_names

CHUNK = 2**23  # bytes of images that are held at once


@dataclass(frozen=True)
class Split:
    """One split of what is to be written.

    Attributes:
        num: images in it.
        chunks: uint8 (n, C, H, W), any n.
    """

    num: int
    chunks: Iterator[np.ndarray]


@dataclass(frozen=True)
class Source:
    """What is to be written.

    Attributes:
        image_shape: (C, H, W).
        levels: number of values that a pixel takes.
        splits: train, and those that there are of val and test.
    """

    image_shape: tuple[int, int, int]
    levels: int
    splits: dict[str, Split]


def run(cfg: DictConfig) -> None:
    """Writes the set that ``cfg`` describes.

    Raises:
        SettingError: for a setting that cannot work, before anything is written, or for a damaged source.
    """
    check_names(cfg, "prepare")
    check_settings(cfg)
    out = Path(str(cfg.out)).expanduser()
    try:
        source = from_arrays(str(cfg.source)) if cfg.source is not None else from_data_module(cfg.data)
        check_space(source, out)
        manifest = write_set(source, out, str(cfg.name or out.name), int(cfg.shard_mb * 1e6))
    except (ValueError, OSError) as error:
        raise SettingError(" ".join(str(error).split())) from None
    print(summary(manifest, out))


def check_settings(cfg: DictConfig) -> None:
    """Refuses what cannot work, in one sentence."""
    if OmegaConf.is_missing(cfg, "out"):
        raise SettingError("out= is missing: give the folder to make, as in out=data/imagenet32")
    if (cfg.source is None) == (cfg.get("data") is None):
        both = "are both given" if cfg.source is not None else "are both missing"
        raise SettingError(f"source= and data= {both}: give one of them, source=<.npz files> or data=<data set>")
    if not str(cfg.out or ""):
        raise SettingError(f"out={cfg.out}: give the folder to make, as in out=data/imagenet32")
    parent = next(path for path in Path(str(cfg.out)).expanduser().absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise SettingError(f"out={cfg.out} cannot be made: {parent} is no folder that can be written to; choose another")
    if os.path.lexists(Path(str(cfg.out)).expanduser()):  # a link that leads nowhere, too
        raise SettingError(f"out={cfg.out} exists and is not overwritten: take it away, or choose another folder")
    if isinstance(cfg.shard_mb, bool) or not isinstance(cfg.shard_mb, (int, float)) or not 0 < cfg.shard_mb < math.inf:
        raise SettingError(f"shard_mb={cfg.shard_mb}: give a number of megabytes above 0")


def from_arrays(source: str) -> Source:
    """Takes the arrays of ``.npz`` files."""
    found = find_arrays(source)

    def chunks(split: str) -> Iterator[np.ndarray]:
        for array in found[split]:
            yield from array.chunks(CHUNK)

    splits = {split: Split(sum(array.shape[0] for array in arrays), chunks(split)) for split, arrays in found.items()}
    return Source(found["train"][0].image_shape, 256, splits)


def from_data_module(cfg: DictConfig) -> Source:
    """Takes the splits of a data set of this framework as they are."""
    if "max_memory_gb" in cfg:
        with open_dict(cfg):
            cfg.max_memory_gb = 0  # pictures are decoded one piece at a time
    datamodule: ImageDataModule = build_part(cfg)
    if datamodule.continuous or datamodule.binarization.name != "none":
        raise SettingError(
            f"data={datamodule.name} has {'continuous values' if datamodule.continuous else 'binary pictures'}: shards hold "
            "whole numbers 0 to 255 as they are; choose another data set, or data/binarization=none"
        )
    datamodule.prepare_data()
    datamodule.setup()

    def chunks(split: str) -> Iterator[np.ndarray]:
        size = max(1, min(512, CHUNK // datamodule.num_dims))
        sampler = GlobalBatchSampler(datamodule.sizes[split], size, shuffle=False, drop_last=False, seed=0)
        batches = ImageBatches(datamodule.splits[split])
        for batch in ImageLoader(batches, sampler=sampler, batch_size=None, num_workers=datamodule.num_workers):
            yield batch.numpy()

    splits = {split: Split(size, chunks(split)) for split, size in datamodule.sizes.items()}
    return Source(datamodule.image_shape, datamodule.levels, splits)


def check_space(source: Source, out: Path) -> None:
    """Refuses to begin what the disk has no room for."""
    out.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(split.num for split in source.splits.values()) * math.prod(source.image_shape)
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise SettingError(
            f"out={out} needs {needed / 1e6:,.1f} MB, but {free / 1e6:,.1f} MB are free there: choose another disk"
        )


def write_set(source: Source, out: Path, name: str, shard_bytes: int) -> Manifest:
    """Writes all files into a folder beside ``out``, the manifest last, and renames it; nothing is left if that fails."""
    draft = out.with_name(f"{out.name}.unfinished-{secrets.token_hex(4)}")
    draft.mkdir()
    try:
        shards = {}
        with tqdm(
            total=sum(split.num for split in source.splits.values()), unit=" images", unit_scale=True, disable=None
        ) as bar:
            for name_of_split, split in source.splits.items():
                chunks = counted(split.chunks, bar)
                shards[name_of_split] = write_split(draft, name_of_split, source.image_shape, split.num, shard_bytes, chunks)
                next(chunks, None)  # a file that goes on after its last image says so
        manifest = Manifest(name, tuple(source.image_shape), source.levels, shards)
        manifest.write(draft)
        draft.rename(out)
    except BaseException as error:  # Ctrl-C too
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, OSError) and os.path.lexists(out):
            raise ValueError(f"out={out} has been made by another command meanwhile, and is not overwritten") from None
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # which names no file
            raise ValueError(f"out={out} cannot be written whole, and nothing of it is kept: {error.strerror}") from None
        raise
    return manifest


def counted(chunks: Iterator[np.ndarray], bar: tqdm) -> Iterator[np.ndarray]:
    """Passes chunks on and moves the bar."""
    for chunk in chunks:
        bar.update(len(chunk))
        yield chunk


def summary(manifest: Manifest, out: Path) -> str:
    """Returns what was written, and how to train on it."""
    parts = [f"{manifest.num(split)} {split} images ({len(files)} files)" for split, files in manifest.splits.items()]
    size = sum(shard.bytes for files in manifest.splits.values() for shard in files)
    shape = "x".join(map(str, manifest.image_shape))
    lines = [f"{manifest.name}: {', '.join(parts)} of {shape}, {manifest.levels} levels, {size / 1e6:,.1f} MB in {out}"]
    stated = [f"data.root={as_value(str(out))}"]
    stated += [] if manifest.image_shape == (3, 32, 32) else [f"data.image_shape={list(manifest.image_shape)}"]
    stated += [] if manifest.levels == 256 else [f"data.levels={manifest.levels}"]
    usual = OmegaConf.load(CONF / "data" / "stream.yaml")
    num = left = manifest.num("train")
    for split in ("val", "test"):
        if split not in manifest.splits:
            held_out = min(usual[f"num_{split}"], max(1, num // 10))
            lines.append(f"no {split} images: data=stream holds data.num_{split}={held_out} of the training images out")
            stated += [] if held_out == usual[f"num_{split}"] else [f"data.num_{split}={held_out}"]
            left -= held_out
    if left < 1:
        return "\n".join([*lines, f"of {num} training images none would be left to train on: prepare more"])
    stated += [] if left >= usual.batch_size else [f"data.batch_size={left}"]
    _, height, width = manifest.image_shape
    fits = height == width >= 32 and height & (height - 1) == 0  # the U-Net of data=stream is CIFAR-10's
    return "\n".join([*lines, shlex.join(["python", "train.py", *([] if fits else ["model=vae"]), "data=stream", *stated])])
