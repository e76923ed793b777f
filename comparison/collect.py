"""Run directories as records: what was set, what came out, and what could not be read."""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from runs.build import SettingError, flatten
from runs.directory import CONFIG, RESULT, higher_is_better
from runs.identity import DEFINES, INCIDENTAL
from runs.sweep_jobs import BEFORE, STATE

LEVELS, EVALUATION = "plots/kl_per_level.csv", "evaluation.json"
EVALUATED = "evaluation/"  # begins the names of what evaluate.py found
REPEATED = ("data.seed", "callbacks.seeding.seed")  # the run's seed, which tells runs of a group apart
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error, yaml.YAMLError)


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        path: the directory.
        settings: dotted key -> value, of what figures depend on.
        choices: group -> chosen file, as ``{"model": "ddpm", "model/schedule": "cosine"}``.
        result: what result.json holds; empty if the run is not finished.
        reason: why it is not finished, in a few words; empty if it is.
        beside: settings by which no figure changes, as ``data.root`` where all runs have the same images.
    """

    path: Path
    settings: dict[str, Any]
    choices: dict[str, str]
    result: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    beside: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.name

    @property
    def seed(self) -> Any:
        """The run's seed."""
        return self.settings.get("seed")

    @property
    def continuous(self) -> bool:
        """Whether its data has no levels, and its figures no bits."""
        return self.settings.get("data.levels", 256) is None

    def metric(self, name: str) -> float | None:
        """Returns a test metric, or the best validation figure for ``val/bpd``, which continuous data has in nats only."""
        if name == "val/bpd":
            return None if self.continuous else self.result.get("objective")
        return self.result.get("metrics", {}).get(name)

    @cached_property
    def validations(self) -> list[dict[str, str]]:
        """The rows of metrics.csv that have a validation metric; empty where it cannot be read."""
        try:
            with (self.path / "metrics.csv").open(newline="", encoding="utf-8") as file:
                reader = csv.reader(file)
                names = next(reader, [])
                places = [place for place, name in enumerate(names) if name.startswith("val/")]
                rows = (row for row in reader if any(row[place] for place in places if place < len(row)))
                return [dict(zip(names, row, strict=False)) for row in rows]  # a damaged one has fewer or more
        except UNREADABLE:
            return []

    @property
    def images_per_second(self) -> float | None:
        """Training images a second of fit, validation included, over all sessions of the run."""
        try:
            seconds, images = self.result["seconds"]["train"], self.result.get("images_seen")
            if images is None:  # a run without callbacks.vitals counts none: then as if it had one session
                batch = self.settings["data.batch_size"] * self.settings.get("trainer.accumulate_grad_batches", 1)
                images = self.result["step"] * batch
            return images / seconds
        except (KeyError, TypeError, ZeroDivisionError):
            return None


def collect(patterns: Sequence[str]) -> tuple[list[Run], list[str]]:
    """Finds run directories under paths and globs.

    Returns:
        (runs by path, a line for each directory that looks like a run and is not readable as one).

    Raises:
        SettingError: if a pattern matches nothing, or nothing under them is a run.
    """
    directories: dict[Path, Path] = {}  # by where they really are: two patterns may reach one run
    runs, skipped = [], []
    for pattern in patterns:
        matched = [str(pattern)] if Path(pattern).exists() else sorted(glob.glob(str(pattern)))
        if not matched:
            raise SettingError(f"runs={pattern} matches nothing: give run directories, sweeps or globs")
        for root in filter(Path.is_dir, map(Path, matched)):
            found = {path.resolve(): path for path in _candidates(root)}
            directories = {**found, **directories}
            if not found:
                skipped.append(f"{root}: holds no run")
    for path in sorted(directories.values()):
        if (again := _superseded(path)) and path not in map(Path, patterns):
            skipped.append(f"{path}: an earlier try of {again.name}")
            continue
        try:
            runs.append(read_run(path))
        except UNREADABLE as error:
            skipped.append(f"{path}: {' '.join(str(error).split())[:120] or type(error).__name__}")
    if not runs:
        detail = f" ({'; '.join(skipped[:3])})" if skipped else ""
        raise SettingError(f"runs={','.join(map(str, patterns))} holds no run that can be read: one has a {CONFIG}{detail}")
    return runs, skipped


def _candidates(root: Path) -> list[Path]:
    """Returns the directories from ``root`` down that hold what a run leaves."""
    return [Path(place) for place, _, files in os.walk(root) if {CONFIG, RESULT, STATE} & set(files)]


def _superseded(directory: Path) -> Path | None:
    """Returns the directory of the job that was run again with ``sweep.fresh=true``, if this is an earlier try of it."""
    name = re.sub(rf"{BEFORE}\d+$", "", directory.name)
    again = directory.with_name(name)
    return again if name != directory.name and again.is_dir() else None


def read_run(directory: Path) -> Run:
    """Reads one run directory.

    Raises:
        ValueError: if its files are not those of a run.
    """
    if not (directory / CONFIG).is_file():  # failed before it had one
        if not (directory / STATE).is_file():
            raise ValueError(f"{CONFIG} is missing")
        state = _json(directory / STATE)
        return Run(directory, {"overrides": " ".join(state["overrides"])}, {}, {}, _why(state))
    try:
        text = (directory / CONFIG).read_text(encoding="utf-8")
        config = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{CONFIG} cannot be read ({error})") from error
    parts = [config.get(name) for name in ("model", "data")] if isinstance(config, dict) else [None]
    if not all(isinstance(part, dict) and "_target_" in part for part in parts):
        raise ValueError(f"{CONFIG} is not that of a run")
    given = {key: value for name in DEFINES for key, value in flatten(config.get(name), name)}
    beside = {key: value for key, value in given.items() if _incidental(key)}
    settings = {key: value for key, value in given.items() if key not in beside}
    if not (directory / RESULT).is_file():
        return Run(directory, settings, {}, {}, _why(_json(directory / STATE) if (directory / STATE).is_file() else {}))
    result = _json(directory / RESULT)
    if not _is_result(result):
        raise ValueError(f"{RESULT} is not that of a run")
    choices = {key: str(value) for key, value in result.get("choices", {}).items() if value is not None}
    return Run(directory, settings, choices, result, beside=beside)


def _why(state: dict[str, Any]) -> str:
    return f"failed: {' '.join(str(state.get('reason', '')).split())}" if state.get("status") == "failed" else "unfinished"


def _is_result(result: dict[str, Any]) -> bool:
    """Whether everything that is read of a result.json has the type it should have."""
    metrics, costs, seconds, choices = (result.get(name, {}) for name in ("metrics", "costs", "seconds", "choices"))
    if "metrics" not in result or not all(isinstance(part, dict) for part in (metrics, costs, seconds, choices)):
        return False
    if not all(isinstance(cost, dict) for cost in costs.values()):
        return False
    numbers = [value for part in (metrics, seconds, *costs.values()) for value in part.values()]
    numbers += [result.get(name) for name in ("parameters", "objective", "images_seen")]
    return all(isinstance(value, (int, float, type(None))) for value in numbers)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not that of a run")
    return value


def _incidental(key: str) -> bool:
    return f"{key}.".startswith(tuple(f"{name}." for name in (*INCIDENTAL, *REPEATED)))


def curve(run: Run, metric: str, over: str = "step") -> tuple[list[int], list[float]]:
    """Returns (steps, values) of a validation metric, or (images_seen, values); empty where there is none."""
    try:
        rows = [row for row in run.validations if row.get(metric)]
        return [int(float(row[over])) for row in rows], [float(row[metric]) for row in rows]
    except UNREADABLE:
        return [], []


def level_kls(run: Run) -> tuple[list[int], list[float]]:
    """Returns (t, KL in nats) that the run left of its latents; empty where there is none."""
    try:
        with (run.path / LEVELS).open(newline="", encoding="utf-8") as file:
            rows = [(int(row["t"]), float(row["nats"])) for row in csv.DictReader(file)]
    except UNREADABLE:
        return [], []
    return [t for t, _ in rows], [kl for _, kl in rows]


def rate_distortion(run: Run) -> tuple[list[float], list[float]]:
    """Returns (rate in bits/dim, RMSE in levels) along the reverse chain, of an evaluated DDPM; empty where there is none.

    Nor is there where other weights were evaluated than the run was tested with, as before it went on.
    """
    try:
        _, own = _evaluation(run)
        rates, errors = (own["steps"][name] for name in ("rate_bits_per_dim", "rmse_levels"))
        return [float(rate) for rate in rates], [float(error) for error in errors]
    except UNREADABLE:
        return [], []


def evaluated(run: Run) -> Run:
    """Returns a finished run with what ``evaluate.py`` last found on its test set in place of what its own test did.

    Its metrics are then ``evaluation/bpd``, ``evaluation/elbo``, ...: those of the weights that the run was tested with. There
    are none where these were not evaluated.
    """
    try:
        evaluation, own = _evaluation(run)
        if evaluation["split"] != "test":
            raise ValueError("the evaluation is not of the test set")
        costs, metrics = {}, {}
        for term, units in own["terms"].items():
            costs[term] = {unit: float(found["mean"]) for unit, found in units.items()}
            metrics[f"{EVALUATED}{term}"] = -costs[term]["nats"] if higher_is_better(term) else costs[term]["nats"]
        if "bits_per_dim" in costs["elbo"]:
            metrics[f"{EVALUATED}bpd"] = costs["elbo"]["bits_per_dim"]
        images = {"num_tested": own["num_images"]}
        if own["num_images"] < evaluation["data"]["num_test"]:
            images["tested_seed"] = evaluation["seed"]  # it says which images they are
    except UNREADABLE:
        return replace(run, result={**run.result, "metrics": {}})
    images["consistency"] = own.get("consistency", False)
    protocol = {**run.result.get("protocol", {}), **evaluation["data"], **images}
    return replace(run, result={**run.result, "metrics": metrics, "costs": costs, "protocol": protocol})


def _evaluation(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (evaluation.json, what it holds of the weights that the run was tested with).

    Raises:
        ValueError: or another of :data:`UNREADABLE`, where there is none.
    """
    evaluation = _json(run.path / EVALUATION)
    evaluated_step, tested_step = evaluation.get("step"), run.result.get("tested_step")
    if None not in (evaluated_step, tested_step) and evaluated_step != tested_step:
        raise ValueError("other weights were evaluated than the run was tested with, as before it went on")
    return evaluation, evaluation["results"][run.result["weights"]]
