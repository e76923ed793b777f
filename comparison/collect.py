"""Run directories as records: what was set, what came out, and what could not be read."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from runs.build import SettingError

CONFIG, RESULT, STATE, LEVELS, EVALUATION = (
    "config.yaml",
    "result.json",
    "job.json",
    "plots/kl_per_level.csv",
    "evaluation.json",
)
SETTINGS = ("model", "data", "trainer", "callbacks", "seed")  # of a config, what figures depend on
INCIDENTAL = ("data.root", "data.seed", "data.download", "callbacks.pictures", "callbacks.progress", "callbacks.seeding.seed")


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        path: the directory.
        settings: dotted key -> value, of what figures depend on.
        choices: group -> chosen file, as ``{"model": "ddpm", "model/schedule": "cosine"}``.
        result: what result.json holds; empty if the run is not finished.
        reason: why it is not finished, in a few words; empty if it is.
    """

    path: Path
    settings: dict[str, Any]
    choices: dict[str, str]
    result: dict[str, Any] = field(default_factory=dict)
    reason: str = ""

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.name

    @property
    def seed(self) -> Any:
        """The run's seed."""
        return self.settings.get("seed")

    def metric(self, name: str) -> float | None:
        """Returns a test metric, or the best validation figure for ``val/bpd``."""
        if name == "val/bpd":
            return self.result.get("objective")
        return self.result.get("metrics", {}).get(name)

    @property
    def images_per_second(self) -> float | None:
        """Training images a second, validation and start-up included."""
        try:
            return self.result["step"] * self.settings["data.batch_size"] / self.result["seconds"]["train"]
        except (KeyError, TypeError, ZeroDivisionError):
            return None


def collect(patterns: Sequence[str]) -> tuple[list[Run], list[str]]:
    """Finds run directories under paths and globs.

    Returns:
        (runs by path, a line for each directory that looks like a run and is not readable as one).

    Raises:
        SettingError: if a pattern matches nothing, or nothing under them is a run.
    """
    configs: dict[Path, None] = {}
    for pattern in patterns:
        matched = sorted(glob.glob(str(pattern)))
        if not matched:
            raise SettingError(f"runs={pattern} matches nothing: give run directories, sweeps or globs")
        for root in map(Path, matched):
            found = [root / CONFIG] if (root / CONFIG).is_file() else sorted(root.rglob(CONFIG))
            failed = sorted(path.parent / CONFIG for path in root.rglob(STATE)) if root.is_dir() else []
            configs |= dict.fromkeys([*found, *failed])
    runs, skipped = [], []
    for path in sorted(configs):
        try:
            runs.append(read_run(path.parent))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            skipped.append(f"{path.parent}: {' '.join(str(error).split())[:120] or type(error).__name__}")
    if not runs:
        detail = f" ({'; '.join(skipped[:3])})" if skipped else ""
        raise SettingError(f"runs={','.join(map(str, patterns))} holds no run directory with a readable {CONFIG}{detail}")
    return runs, skipped


def read_run(directory: Path) -> Run:
    """Reads one run directory.

    Raises:
        ValueError: if its files are not those of a run.
    """
    state = _json(directory / STATE) if (directory / STATE).is_file() else {}
    if not (directory / CONFIG).is_file():  # failed before it had one
        return Run(directory, {"overrides": " ".join(state["overrides"])}, {}, {}, _why(state))
    config = yaml.load((directory / CONFIG).read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(f"{CONFIG} is not that of a run")
    settings = {key: value for name in SETTINGS for key, value in flatten(config.get(name), name)}
    if not (directory / RESULT).is_file():
        return Run(directory, settings, {}, {}, _why(state))
    result = _json(directory / RESULT)
    if not isinstance(result.get("metrics"), dict):
        raise ValueError(f"{RESULT} is not that of a run")
    choices = {key: str(value) for key, value in result.get("choices", {}).items() if value is not None}
    return Run(directory, settings, choices, result)


def _why(state: dict[str, Any]) -> str:
    return f"failed: {state.get('reason', '')}" if state.get("status") == "failed" else "unfinished"


def _json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not that of a run")
    return value


def flatten(value: Any, prefix: str) -> list[tuple[str, Any]]:
    """Returns (dotted key, value) of nested dicts, without what figures do not depend on; lists are leaves."""
    if prefix.startswith(INCIDENTAL):
        return []
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [leaf for key, child in value.items() for leaf in flatten(child, f"{prefix}.{key}")]


def curve(run: Run, metric: str) -> tuple[list[int], list[float]]:
    """Returns (steps, values) of a metric in metrics.csv; empty where there is none."""
    steps, values = [], []
    try:
        with (run.path / "metrics.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                if row.get(metric):
                    steps.append(int(row["step"]))
                    values.append(float(row[metric]))
    except (OSError, ValueError, TypeError):
        return [], []
    return steps, values


def level_kls(run: Run) -> tuple[list[int], list[float]]:
    """Returns (t, KL in nats) that the run left of its latents; empty where there is none."""
    try:
        with (run.path / LEVELS).open(newline="") as file:
            rows = [(int(row["t"]), float(row["nats"])) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError):
        return [], []
    return [t for t, _ in rows], [kl for _, kl in rows]


def rate_distortion(run: Run) -> tuple[list[float], list[float]]:
    """Returns (rate in bits/dim, RMSE in levels) along the reverse chain, of an evaluated DDPM; empty where there is none."""
    try:
        results = _json(run.path / EVALUATION)["results"]
        steps = next(iter(results.values()))["steps"]
        return [float(rate) for rate in steps["rate_bits_per_dim"]], [float(error) for error in steps["rmse_levels"]]
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return [], []
