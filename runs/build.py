"""From a config to objects, with every refusal as one sentence."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runs.faults import is_fault, is_somebodys
from runs.kinds import unknown, wrong_kinds


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
        SettingError: for a setting of another kind than its constructor says it takes; with the sentence of the constructor
            that refused, without Hydra's frames around it.
    """
    if "_target_" not in cfg:
        raise SettingError(f"{cfg._get_full_key(None)} has no _target_: give what is to be built, as in package.Class")
    if wrong := next(wrong_kinds(cfg), None):
        raise SettingError(wrong)
    try:
        part = instantiate(cfg, _convert_="all", **extra)
    except InstantiationException as error:
        cause = error.__cause__ or error
        sentence = " ".join(str(cause).split())
        key = _key_of(error, cfg)
        fault = cause if is_somebodys(cause) else None  # what is shown with where it happened, if it was no refusal
        if isinstance(cause, (ValueError, FileNotFoundError)) and not (fault and is_fault(fault)):  # written to be read
            raise SettingError(_with_setting(sentence, cfg, key)) from None
        if wrong := next(wrong_kinds(cfg, nulls=True), None):
            raise SettingError(wrong) from None
        node = OmegaConf.select(cfg._get_root(), key) if key else None
        settings = {} if not isinstance(node, DictConfig) else {k: v for k, v in node.items() if str(k)[0] != "_"}
        found = re.search(r"unexpected keyword argument '(\w+)'", sentence)
        if found and found[1] in settings:
            raise SettingError(unknown(node, found[1])) from None
        plain_ones = [f"{name}={value}" for name, value in settings.items() if not OmegaConf.is_dict(value)]
        given = f" with {', '.join(plain_ones)}" if plain_ones else ""
        raise SettingError(f"{key or 'the config'} cannot be built{given}: {sentence}") from fault
    if wrong := next(wrong_kinds(cfg, nulls=True), None):  # what was built would fail when it comes to use it
        raise SettingError(wrong)
    return part


def _with_setting(sentence: str, cfg: DictConfig, key: str) -> str:
    """Returns a constructor's sentence after the setting it is about, where it names that by its last name alone.

    Several settings may have that name: then it is the one whose value the sentence gives, or none.
    """
    if not key or re.search(rf"\b{key.partition('.')[0]}[./]", sentence):
        return sentence
    leaves = flatten(OmegaConf.to_container(cfg, resolve=True), str(cfg._get_full_key(None) or ""))
    named = {name: value for name, value in leaves if re.search(rf"\b{re.escape(name.rpartition('.')[2])}\b", sentence)}
    given = [name for name, value in named.items() if re.search(rf"(got |=){re.escape(str(value))}(?![\w.])", sentence)]
    meant = given or list(named)
    if len(meant) == 1:
        parent, _, last = meant[0].rpartition(".")
        given = f"{last}={named[meant[0]]}"
        return f"{parent}.{sentence}" if sentence.startswith(given) else f"{parent}.{given}: {sentence}"
    if not named:
        return sentence if "=" in sentence else f"{key}: {sentence}"
    parents = {name.rpartition(".")[0] for name in meant}
    return f"{parents.pop() if len(parents) == 1 else key}: {sentence}"


def _key_of(error: InstantiationException, cfg: DictConfig) -> str:
    """Returns which node Hydra was at."""
    found = re.search(r"full_key: (\S+)", str(error))
    return found[1] if found else str(cfg._get_full_key(None) or "")


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Returns a config as plain containers, resolved: what a checkpoint, W&B and config.yaml hold.

    Raises:
        SettingError: if a value is missing, or refers to what is not there.
    """
    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise SettingError(" ".join(str(error).split())) from None


def flatten(value: Any, prefix: str) -> list[tuple[str, Any]]:
    """Returns (dotted key, value) for every leaf of nested dicts; lists count as leaves."""
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [leaf for key, child in value.items() for leaf in flatten(child, f"{prefix}.{key}")]
