"""Commands that are printed for people, or started for ranks: what Hydra and the shell read back as it was meant."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

CONF = Path(__file__).resolve().parents[1] / "conf"  # of all entry points
NAME = "train"  # the one it begins with


def as_value(text: str) -> str:
    """Returns a text as Hydra's grammar has it behind ``KEY=``: in quotes where it would be read as something else."""
    try:
        read = OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        read = None
    return text if read == text and "$" not in text else QuotedString(text, Quote.single).with_quotes()


def as_written(config: DictConfig) -> list[str]:
    """Returns a sweep's overrides as they were given: ``data.split_seed=${seed}`` is another value in each of its jobs."""
    return OmegaConf.to_container(config.hydra.overrides.task, resolve=False)


def chosen(cfg: DictConfig, group: str) -> str:
    """Returns the name of what was chosen of a group; a config without choices, as a run's config.yaml, has a class's."""
    name = HydraConfig.get().runtime.choices.get(group)
    return name or str(OmegaConf.select(cfg, f"{group}._target_")).rpartition(".")[2]


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
