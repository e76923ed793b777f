"""Writes images as shards for ``data=stream``: ``python prepare.py source=... out=...``; see ``--help``."""

from __future__ import annotations

if __name__ == "__main__":
    from runs.interrupts import end_at_once

    end_at_once()

import sys

import hydra
from omegaconf import DictConfig

# torch and lightning take seconds to import: they are imported inside, so that --help and --cfg answer at once


@hydra.main(version_base="1.3", config_path="conf", config_name="prepare")
def main(cfg: DictConfig) -> None:
    """Writes one set."""
    from runs.entry import INTERRUPTED, loading, refusals

    with loading():
        from runs.preparation import run

    try:
        with refusals():
            run(cfg)
    except KeyboardInterrupt:
        print("interrupted: nothing was kept", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    from runs.entry import start

    start(main)
