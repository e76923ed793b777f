"""Scores a trained model: ``python evaluate.py run=outputs/...``; see ``--help``."""

from __future__ import annotations

if __name__ == "__main__":
    from runs.interrupts import end_at_once

    end_at_once()

import hydra
from omegaconf import DictConfig

# torch and lightning take seconds to import: they are imported inside, so that --help and --cfg answer at once


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> float | None:
    """Runs one evaluation; returns bits/dim (nats for continuous data)."""
    from runs.entry import finish, loading

    with loading():
        from evaluation.job import run

    return finish(run, cfg)


if __name__ == "__main__":
    from runs.entry import start

    start(main)
