"""Floor 4: what watches a run: averaging, seeding, checkpoints, requeuing, progress, vitals, pictures and batch size."""

from callbacks.batch_size import BatchSizeFinder
from callbacks.checkpoints import RunCheckpoint, all_finite, diverged
from callbacks.ema import EMA
from callbacks.pictures import Pictures
from callbacks.progress import LineProgress, progress_bar
from callbacks.requeue import Requeue
from callbacks.seeding import SeededBatches
from callbacks.vitals import Vitals
from callbacks.whole_steps import WholeSteps

__all__ = [
    "EMA",
    "BatchSizeFinder",
    "LineProgress",
    "Pictures",
    "Requeue",
    "RunCheckpoint",
    "SeededBatches",
    "Vitals",
    "WholeSteps",
    "all_finite",
    "diverged",
    "progress_bar",
]
