"""A run trained again from its own config.yaml: ``python train.py --config-dir RUN --config-name config``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from runs.commands import as_value
from runs.identity import is_sweep

NAME, PLACE = ("--config-name", "-cn"), ("--config-dir", "-cd", "--config-path", "-cp")
ANEW = {  # what conf/train.yaml says to Hydra, and what is of the first run alone: where its pictures are, what it went on from
    "hydra.run.dir": "${paths.output_dir}/${now:%Y-%m-%d}/${now:%H-%M-%S}-again",
    "hydra.output_subdir": "null",
    "hydra/job_logging": "stdout",
    "callbacks.pictures.directory": "${hydra:runtime.output_dir}",
    "ckpt": "null",
}
SWEPT = {  # and of sweeps
    "hydra/sweeper": "grid",
    "hydra.sweep.subdir": ".",
    "+hydra.callbacks.sweep._target_": "runs.sweep.SweepReport",
}
FOLLOWS = {  # what conf/ takes from another setting: it follows that one here, too, where config.yaml has but its value
    "data.seed": "seed",
    "callbacks.seeding.seed": "seed",
    "data.root": "paths.data_dir",
    "logger.save_dir": "paths.output_dir",
}


def as_another_run(arguments: Sequence[str]) -> list[str]:
    """Adds to a command line that names a run's config.yaml what makes a run of its own of it; others stay as they are."""
    name, place = _value(arguments, NAME), _value(arguments, PLACE)
    if name is None or place is None:
        return list(arguments)
    try:
        config = yaml.safe_load((Path(place) / f"{name.removesuffix('.yaml')}.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # Hydra says what is wrong
        return list(arguments)
    if (
        not isinstance(config, dict)
        or not {"model", "data", "trainer"} <= config.keys()
        or {"defaults", "hydra"} & config.keys()
    ):
        return list(arguments)
    given = {item.lstrip("+~").partition("=")[0] for item in arguments}
    swept = is_sweep(arguments)
    anew = {**ANEW, **(SWEPT if swept else {}), **_following(config, given, swept)}
    if swept:
        del anew["hydra.run.dir"]
    if choices := _choices(Path(place)):
        anew["+hydra.runtime.choices"] = choices
    return [*arguments, *(f"{key}={value}" for key, value in anew.items() if _is_open(key.lstrip("+"), config, given))]


def _is_open(key: str, config: dict[str, Any], given: set[str]) -> bool:
    """Whether the command line says nothing of a setting, and if it is a callback's, that there is one."""
    part = key.rpartition(".")[0]
    return key not in given and (not key.startswith("callbacks.") or (_held(config, part) and not {"callbacks", part} & given))


def _following(config: dict[str, Any], given: set[str], swept: bool) -> dict[str, str]:
    """Returns what changes with the settings that are given."""
    changed = {}
    for key, source in FOLLOWS.items():
        here, there = _held(config, key), _held(config, source)
        if source in given and here is not None and f"{here}/".startswith(f"{there}/"):
            changed[key] = _text(f"${{{source}}}", str(here)[len(str(there)) :])
    if str(_held(config, "logger._target_")).endswith("TensorBoardLogger"):  # in the run's own directory
        changed["logger.save_dir"] = "${hydra:runtime.output_dir}"
    name, end = str(_held(config, "logger.name")), f"-s{config.get('seed')}"
    if "seed" in given and name.endswith(end) and not swept:  # the jobs of a sweep have names by it
        changed["logger.name"] = _text(f"{name.removesuffix(end)}-s", "${seed}")
    return changed


def _text(*parts: str) -> str:
    """Returns a text as Hydra's grammar has it; in quotes, a number that is referred to would become a text."""
    text = "".join(parts)
    return text if re.fullmatch(r"[\w./${}-]+", text) else as_value(text)


def _held(config: Any, key: str) -> Any:
    """Returns the value of a dotted key; ``None`` if there is none."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _choices(directory: Path) -> str | None:
    """Returns what the first run chose of each group, which its config.yaml does not say and by which runs are compared."""
    try:
        choices = json.loads((directory / "result.json").read_text(encoding="utf-8"))["choices"]
        pairs = {key: "null" if value is None else str(value) for key, value in choices.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # it has not ended, or is damaged
        return None
    named = [f"{key}:{value}" for key, value in pairs.items() if re.fullmatch(r"[\w/@.-]+:[\w.-]+", f"{key}:{value}")]
    return f"{{{','.join(named)}}}" if named else None


def _value(arguments: Sequence[str], flags: Sequence[str]) -> str | None:
    """Returns what a flag is given, as ``--flag VALUE`` or ``--flag=VALUE``."""
    for item, following in zip(arguments, [*arguments[1:], None], strict=True):
        if item in flags:
            return following
        if item.startswith(tuple(f"{flag}=" for flag in flags)):
            return item.partition("=")[2]
    return None
