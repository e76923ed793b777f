"""Images a second of ``data=stream``: ``python -m benchmarks.streaming`` prints a table, and writes its figures.

Random images of 3x32x32 are written to a temporary folder. Compared in one process and pass by pass: the resident tensor,
shards in the system's page cache, and shards that have to come from the disk.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import RESULTS, write_record
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


def cases(root: Path, passes: int) -> Iterator[dict[str, Any]]:
    """Yields one row of the table after the other, for the images in ``root``."""
    held_out = {"num_val": 1000, "num_test": 1000}
    for flip in (False, True):
        speed = images_per_second(Resident(root, flip), passes)
        yield {"data": "resident", "from": "memory", "flip": flip, "images_per_second": speed}
        for workers in (0, 1):
            data = StreamDataModule(str(root), flip, num_workers=workers, **held_out, **SHARED)
            speed = images_per_second(data, passes)
            yield {"data": f"stream, num_workers={workers}", "from": "page cache", "flip": flip, "images_per_second": speed}
    for size in (1, 16, 64, 256):
        data = StreamDataModule(str(root), num_workers=0, block_size=size, **held_out, **SHARED)
        speed = images_per_second(data, passes, cold=root)
        name = f"stream, num_workers=0 block_size={size}"
        yield {"data": name, "from": "disk", "flip": False, "images_per_second": speed}


def main() -> None:
    """Prints the table and writes its figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--passes", type=int, default=9, help="over the images; the median counts")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of streaming.json")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), settings.images)
        print("| data | from | flip | images/s |\n|---|---|---|---|")
        for row in cases(Path(folder), settings.passes):
            rows.append(row)
            print(f"| {row['data']} | {row['from']} | {row['flip']} | {row['images_per_second']:,.0f} |", flush=True)
    write_record(settings.out / "streaming.json", {"images": settings.images, "passes": settings.passes, "rows": rows})


if __name__ == "__main__":
    main()
