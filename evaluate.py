"""Scores a trained model: ``python evaluate.py run=outputs/...``; see ``--help``."""

from __future__ import annotations

import os

import hydra
from omegaconf import DictConfig

# torch and lightning take seconds to import: they are imported inside, so that --help and --cfg answer at once


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> float | None:
    """Runs one evaluation; returns bits/dim (nats for continuous data)."""
    import sys

    from runs.entry import loading

    with loading():
        from evaluation.job import run
        from runs.build import SettingError

    try:
        figure, interrupted = run(cfg)
    except SettingError as error:
        sys.exit(1 if os.environ.get("LOCAL_RANK", "0") != "0" else f"error: {error}")  # said once, by rank 0
    if interrupted:
        sys.exit(130)  # as a shell has it for Ctrl-C
    return figure


if __name__ == "__main__":
    from runs.entry import start

    start(main)
