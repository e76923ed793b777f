"""Floor 4: what watches a run: averaging, seeding, checkpoints, stopping, progress, vitals, pictures and batch size."""

from callbacks.batch_size import BatchSizeFinder
from callbacks.checkpoints import RunCheckpoint, all_finite, diverged, run_checkpoint, tested_step
from callbacks.ema import EMA
from callbacks.last_validation import LastValidation, out_of_patience
from callbacks.pictures import Pictures
from callbacks.progress import LineProgress, progress_bar
from callbacks.seeding import SeededBatches
from callbacks.stopping import StopsAfterBatch, StopTogether
from callbacks.vitals import Vitals
from callbacks.whole_steps import WholeSteps

__all__ = [
    "EMA",
    "BatchSizeFinder",
    "LastValidation",
    "LineProgress",
    "Pictures",
    "RunCheckpoint",
    "SeededBatches",
    "StopTogether",
    "StopsAfterBatch",
    "Vitals",
    "WholeSteps",
    "all_finite",
    "diverged",
    "out_of_patience",
    "progress_bar",
    "run_checkpoint",
    "tested_step",
]
