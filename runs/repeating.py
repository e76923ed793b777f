"""A run trained again from its own config.yaml: ``python train.py --config-dir RUN --config-name config``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

NAME, PLACE = ("--config-name", "-cn"), ("--config-dir", "-cd", "--config-path", "-cp")
ANEW = {  # what conf/train.yaml says to Hydra, and what is of the first run alone: where its pictures are, what it went on from
    "hydra.run.dir": "${paths.output_dir}/${now:%Y-%m-%d}/${now:%H-%M-%S}-again",
    "hydra.output_subdir": "null",
    "hydra/job_logging": "stdout",
    "callbacks.pictures.directory": "${hydra:runtime.output_dir}",
    "ckpt": "null",
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
    pictures = (config.get("callbacks") or {}).get("pictures") and not {"callbacks", "callbacks.pictures"} & given
    anew = {key: value for key, value in ANEW.items() if key not in given and (pictures or "pictures" not in key)}
    return [*arguments, *(f"{key}={value}" for key, value in anew.items())]


def _value(arguments: Sequence[str], flags: Sequence[str]) -> str | None:
    """Returns what a flag is given, as ``--flag VALUE`` or ``--flag=VALUE``."""
    for item, following in zip(arguments, [*arguments[1:], None], strict=True):
        if item in flags:
            return following
        if item.startswith(tuple(f"{flag}=" for flag in flags)):
            return item.partition("=")[2]
    return None
