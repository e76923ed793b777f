"""How long one waits: for ``--help``, ``--cfg job``, and the first training step."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.paired import Row, in_turns

TRAIN = str(Path(__file__).parents[1] / "train.py")
TEXT = "{ours} and {theirs} ms"


class StopAtFirstStep(Callback):
    """Ends the process when the first training step is done."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the process."""
        os._exit(0)


def startup(rounds: int) -> list[Row]:
    """Whole processes against the import of Hydra, and of Lightning and W&B."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        hydra = partial(_process, folder, "-c", "import hydra")
        for what in (["--help"], ["--cfg", "job"]):
            pairs = in_turns(partial(_process, folder, TRAIN, *what), hydra, rounds)
            rows.append(pairs.row(f"train.py {' '.join(what)}", "import hydra", 6, True, TEXT))
        first = ["model=vae", "+callbacks.stop._target_=benchmarks.startup.StopAtFirstStep", f"paths.output_dir={folder}"]
        pairs = in_turns(
            partial(_process, folder, TRAIN, *first), partial(_process, folder, "-c", "import lightning, wandb"), rounds
        )
        rows.append(pairs.row("from command to first training step", "import lightning, wandb", 1.5, True, TEXT))
    return rows


def _process(folder: str, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(TRAIN).parent)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
