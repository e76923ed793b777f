"""Compares runs: ``python compare.py runs=outputs/sweeps/...``; see ``--help``."""

from __future__ import annotations

if __name__ == "__main__":
    from runs.interrupts import end_at_once

    end_at_once()

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="compare")
def main(cfg: DictConfig) -> None:
    """Prints a table and writes comparison.html, .csv and .md."""
    from comparison.job import run
    from runs.entry import refusals

    with refusals():
        run(cfg)


if __name__ == "__main__":
    from runs.entry import start

    start(main)
