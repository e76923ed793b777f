"""Trains one model and tests it: ``python train.py model=ddpm data=cifar10 trainer.devices=4``; see ``--help``."""

from __future__ import annotations

if __name__ == "__main__":
    from runs.interrupts import end_at_once

    end_at_once()

import sys

import hydra
from omegaconf import DictConfig

# torch and lightning take seconds to import: they are imported inside, so that --help and --cfg answer at once


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Runs one job; returns its best validation bits/dim (nats for continuous data), which sweepers minimise."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from runs.entry import TERMINATED, loading, refusals

    with loading():
        from lightning.pytorch.utilities.exceptions import SIGTERMException

        from runs.devices import is_child_rank
        from runs.job import run
        from runs.sweep import run_in_sweep

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return run_in_sweep(cfg, run)
    try:
        with refusals():
            return run(cfg)
    except SIGTERMException:  # Lightning kills rank 0, which may be writing, when a child of its ends with another code than 0
        sys.exit(0 if is_child_rank() else TERMINATED)


if __name__ == "__main__":
    from runs.entry import start
    from runs.identity import is_sweep, with_choices, with_sweep_directory
    from runs.repeating import as_another_run

    sys.argv = with_sweep_directory(as_another_run(sys.argv))
    if is_sweep(sys.argv):
        from runs.sweep import run_sweep

        sys.argv = with_choices(sys.argv)
        sys.exit(run_sweep(main))
    start(main)
