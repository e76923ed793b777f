"""Floor 4: what watches a run: averaging, seeding, checkpoints, progress, vitals and pictures."""

from callbacks.checkpoints import RunCheckpoint, all_finite, diverged
from callbacks.ema import EMA
from callbacks.pictures import Pictures
from callbacks.progress import LineProgress, progress_bar
from callbacks.seeding import SeededBatches
from callbacks.vitals import Vitals

__all__ = [
    "EMA",
    "LineProgress",
    "Pictures",
    "RunCheckpoint",
    "SeededBatches",
    "Vitals",
    "all_finite",
    "diverged",
    "progress_bar",
]
