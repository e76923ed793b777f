"""From a config to objects, with every refusal as one sentence."""

from __future__ import annotations

from functools import partial
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class SettingError(Exception):
    """A setting that cannot work. The message is one sentence: the setting, its value and what to do."""


class RankError(SettingError):
    """What one rank may have met alone, once training has begun: it says so itself."""


def factory(cfg: DictConfig) -> partial:
    """Returns the node's ``_target_`` with its settings bound, for what is better passed by hand than through a config."""
    return build_part(cfg, _partial_=True)


def build_part(cfg: DictConfig, **extra: Any) -> Any:
    """Instantiates a config node by its ``_target_``, nested ones first.

    Raises:
        SettingError: with the sentence of the constructor that refused, without Hydra's frames around it.
    """
    try:
        return instantiate(cfg, _convert_="all", **extra)
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, (ValueError, FileNotFoundError)):
            raise SettingError(str(cause)) from None
        sentence = " ".join(str(cause).split())
        raise SettingError(f"{cfg._get_full_key(None) or 'the config'} cannot be built: {sentence}") from error


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Returns a config as plain containers, resolved: what a checkpoint, W&B and config.yaml hold.

    Raises:
        SettingError: if a value is missing, or refers to what is not there.
    """
    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise SettingError(" ".join(str(error).split())) from None
