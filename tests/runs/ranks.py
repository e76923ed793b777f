"""A callback for jobs that are tested as commands: each rank writes what it was told to train."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback


class Record(Callback):
    """Writes rank-<r>.json into the run directory: this rank's config, overrides, and learning rate in use."""

    def on_train_start(self, trainer, pl_module):
        seen = {
            "config": trainer.checkpoint_callback.config,
            "overrides": sorted(item for item in HydraConfig.get().overrides.task if not item.startswith("ckpt=")),
            "lr": trainer.optimizers[0].defaults["lr"],
            "directory": str(Path(trainer.default_root_dir).resolve()),
        }
        (Path(trainer.default_root_dir) / f"rank-{trainer.global_rank}.json").write_text(json.dumps(seen))


RECORD = ("+callbacks.record._target_=tests.runs.ranks.Record",)


def assert_ranks_agree(directory: Path, ranks: int = 2) -> None:
    """Holds what each rank wrote to what the others wrote, and to the run's config.yaml."""
    seen = [json.loads((directory / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    assert len(list(directory.glob("rank-*.json"))) == ranks
    assert all(one == seen[0] for one in seen)
    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert seen[0]["config"] == json.loads(json.dumps({name: config[name] for name in ("model", "data", "seed")}))
    assert seen[0]["lr"] == config["model"]["optimizer"]["lr"]
    assert seen[0]["directory"] == str(directory.resolve())
