"""Commands that are printed for people, or started for ranks: what Hydra and the shell read back as it was meant."""

from __future__ import annotations

import re
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

CONF = Path(__file__).resolve().parents[1] / "conf"  # where train.py's own configs lie
NAME = "train"  # the one it begins with


def as_value(text: str) -> str:
    """Returns a text as Hydra's grammar has it behind ``KEY=``: in quotes where it would be read as something else."""
    plain_one = re.fullmatch(r"[\w ./-]+", text, re.ASCII) and not re.fullmatch(r"[\d_.e+-]+", text)
    return text if plain_one else "'" + text.replace("'", r"\'") + "'"


def config_flags() -> list[str]:
    """Returns the flags by which this job found configs beside train.py's own, and another one to begin with."""
    hydra = HydraConfig.get()
    flags = [] if hydra.job.config_name == NAME else ["--config-name", hydra.job.config_name]
    for source in hydra.runtime.config_sources:
        if source.schema == "file" and source.provider == "command-line":
            flags += ["--config-dir", source.path]
        elif source.schema == "file" and source.provider == "main" and Path(source.path).resolve() != CONF:
            flags += ["--config-path", source.path]
    return flags
