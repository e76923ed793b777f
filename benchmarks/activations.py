"""What ``checkpoint_activations`` gives and what it takes: CIFAR-10's U-Net with and without it, steps in turns."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.jobs import configure
from benchmarks.paired import Pairs, in_turns
from benchmarks.scaling_cases import TrainingStep
from runs.build import build_part

BATCH = 4


@dataclass(frozen=True)
class Activations:
    """With checkpointed activations and without.

    Attributes:
        again: bytes that are kept for the backward pass where blocks run again.
        whole: bytes that are kept where they do not.
        pairs: seconds a step of both.
    """

    again: int
    whole: int
    pairs: Pairs

    def __str__(self) -> str:
        """What the page says."""
        ratios = self.pairs.ratios(at_most=True)
        ours, theirs = (statistics.median(seconds) for seconds in (self.pairs.ours, self.pairs.theirs))
        return (
            f"**Checkpointed activations** (`model.network.checkpoint_activations=true`): at batch {BATCH} CIFAR-10's network "
            f"keeps {self.again / 2**20:.0f} MiB for the backward pass instead of {self.whole / 2**20:.0f} MiB, counted, and "
            f"what is inside of one block while that runs again. In the median pair a step takes "
            f"{statistics.median(ratios):.2f} times as long ({min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} pairs; "
            f"the medians of the times by themselves are {ours:.2g} s and {theirs:.2g} s)."
        )


def step(again: bool, *overrides: str) -> TrainingStep:
    """Returns a training step of the recipe's network, whose blocks run ``again`` in the backward pass or not."""
    with tempfile.TemporaryDirectory() as folder:
        setting = f"model.network.checkpoint_activations={str(again).lower()}"
        cfg = configure(Path(folder), "experiment=ddpm_cifar10", setting, *overrides)
    return TrainingStep(build_part(cfg.model), BATCH)


def measure(rounds: int, *overrides: str) -> Activations:
    """Counts both and times them in turns."""
    ours, theirs = step(True, *overrides), step(False, *overrides)
    return Activations(ours.kept(), theirs.kept(), in_turns(ours, theirs, rounds, warm_up=2))
