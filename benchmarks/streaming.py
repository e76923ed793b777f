"""Images a second of ``data=stream``: ``python -m benchmarks.streaming`` prints a table.

Random images of 3x32x32 are written to a temporary folder. Compared in one process and pass by pass: the resident tensor,
shards in the system's page cache, and shards that have to come from the disk.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from datamodules import ImageDataModule, StreamDataModule
from datamodules.shards import Manifest, write_split

SHAPE = (3, 32, 32)
SHARED = {"image_shape": SHAPE, "levels": 256, "batch_size": 128, "seed": 0}


class Resident(ImageDataModule):
    """The same images in memory."""

    name = "resident"

    def __init__(self, root: Path, horizontal_flip: bool) -> None:
        super().__init__(**SHARED, actual_shape=SHAPE, actual_levels=256, flip=horizontal_flip)
        self.root = root

    def load(self) -> dict[str, torch.Tensor]:
        """Reads the shards."""
        return {"train": torch.cat([torch.from_numpy(np.load(path)) for path in sorted(self.root.glob("*.npy"))])}


def write(root: Path, num: int) -> None:
    """Writes ``num`` training images."""
    rng = np.random.default_rng(0)
    chunks = (rng.integers(0, 256, (min(1000, num - start), *SHAPE), dtype=np.uint8) for start in range(0, num, 1000))
    shards = {"train": write_split(root, "train", SHAPE, num, 2**27, chunks)}
    Manifest("random", SHAPE, 256, shards).write(root)
    os.sync()


def forget(root: Path) -> None:
    """Has the system drop the shards from its page cache."""
    for path in root.glob("*.npy"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def images_per_second(data: ImageDataModule, passes: int, cold: Path | None = None) -> float:
    """Returns the median over passes; before each of them the shards in ``cold`` are dropped from the page cache."""
    data.setup()
    loader, speeds = data.train_dataloader(), []
    for epoch in range(passes):
        if cold:
            forget(cold)
        loader.sampler.set_epoch(epoch)
        start, count = time.perf_counter(), 0
        for batch in loader:
            count += len(batch)
        speeds.append(count / (time.perf_counter() - start))
    return statistics.median(speeds)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--passes", type=int, default=5)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, settings.images)
        held_out = {"num_val": 1000, "num_test": 1000}
        print("| data | from | flip | images/s |\n|---|---|---|---|")
        for flip in (False, True):
            speed = images_per_second(Resident(root, flip), settings.passes)
            print(f"| resident | memory | {flip} | {speed:,.0f} |", flush=True)
            for workers in (0, 1):
                data = StreamDataModule(str(root), flip, num_workers=workers, **held_out, **SHARED)
                speed = images_per_second(data, settings.passes)
                print(f"| stream, num_workers={workers} | page cache | {flip} | {speed:,.0f} |", flush=True)
        for size in (1, 16, 64, 256):
            data = StreamDataModule(str(root), num_workers=0, block_size=size, **held_out, **SHARED)
            speed = images_per_second(data, settings.passes, cold=root)
            print(f"| stream, num_workers=0 block_size={size} | disk | False | {speed:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
