"""Writes small data sets in the true formats of their files."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

CIFAR10_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def pictures(num: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Smooth random pictures: (num, *shape) uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (num, *[max(1, size // 8) for size in shape]))
    for axis, size in enumerate(shape, start=1):
        coarse = np.repeat(coarse, -(-size // coarse.shape[axis]), axis).take(range(size), axis)
    return (0.8 * coarse + 0.2 * rng.integers(0, 256, (num, *shape))).astype(np.uint8)


def write_cifar10(folder: Path, batches: list[np.ndarray]) -> None:
    """Five training batches and a test batch, each (n, 3072), as pickles of protocol 2 like the true files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, batch in zip(CIFAR10_FILES, batches, strict=True):
        entry = {"data": batch, "labels": [0] * len(batch), "batch_label": name, "filenames": ["x.png"] * len(batch)}
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))


def write_idx(path: Path, images: np.ndarray) -> None:
    """One idx file of images (n, H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(">4I", 0x803, *images.shape) + images.tobytes())


def write_svhn(folder: Path, splits: dict[str, np.ndarray]) -> None:
    """The cropped digits of each split, (n, 3, 32, 32), as MATLAB files."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, images in splits.items():
        labels = np.ones((len(images), 1), dtype=np.uint8)
        scipy.io.savemat(folder / f"{split}_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": labels})


def write_folder(folder: Path, images: np.ndarray) -> None:
    """PNG files of images (n, H, W, 3)."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.png")
