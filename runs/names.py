"""Names of settings: what one that is not there may have been meant for."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runs.commands import CONF

# they hand on to a library what this framework does not set
OPEN = ("trainer.", "logger.", "callbacks.", "model.optimizer.", "hydra.")


def no_setting(name: str, adding: str) -> str:
    """Says what a setting that is not there may have been meant for, and how Hydra would add it."""
    group = name.split(".")[0]
    choices = [f"{group}={path.stem}" for path in sorted((CONF / group).glob("*.yaml"))]
    others = {choice: _settings(choice) for choice in choices}
    if having := [choice for choice, settings in others.items() if name in settings]:
        return f"{name} is a setting of {' and of '.join(having)}, not of what is chosen: add {' or '.join(having)}"
    near = get_close_matches(name, {*_settings(), *_groups()}, n=2, cutoff=0.8)
    near = near or get_close_matches(name, {setting for settings in others.values() for setting in settings}, n=1, cutoff=0.8)
    near = near or _ending(name, _settings())
    advice = f"is it {' or '.join(near)}?" if near else f"python {Path(sys.argv[0]).name} --cfg job shows them all"
    if name.startswith(OPEN):
        advice += f"{';' * (not near)} {adding} adds one"
    return f"{name} is no setting: {advice}"


def check_names(cfg: DictConfig, command: str) -> None:
    """Refuses what stands at the top of a config and is read by nothing: not by the command, nor by another setting.

    Args:
        cfg: the job's.
        command: whose job it is: ``train`` for train.py.

    Raises:
        SettingError: naming it, and what it may have been meant for.
    """
    from runs.build import SettingError, flatten

    own = OmegaConf.load(CONF / f"{command}.yaml")
    groups = {key.split()[-1].split("@")[0] for entry in own.defaults if not isinstance(entry, str) for key in entry}
    text = OmegaConf.to_yaml(cfg)
    for name in own:
        if name not in ("defaults", "hydra", *cfg.keys()):
            raise SettingError(f"{name} is left out by ~{name}, and the command reads it: leave it alone, or give a value")
    for name in cfg:
        referred = re.search(rf"\$\{{([\w.]+:)?{re.escape(str(name))}[.,\[}}]", text)  # as in ${name}, ${oc.decode:${name}}
        if name in {*own.keys(), *groups} or referred:
            continue
        leaves = flatten(OmegaConf.to_container(cfg[name]) if OmegaConf.is_config(cfg[name]) else cfg[name], name)
        key, value = leaves[0] if leaves else (name, cfg[name])
        known = [setting for setting in _settings() if setting.partition(".")[0] != name]
        near = _ending(key, known) or get_close_matches(key, known, n=1, cutoff=0.8)
        raise SettingError(f"{key}={value}: nothing reads it; {f'is it {near[0]}?' if near else 'leave it out'}")


def _ending(name: str, settings: Iterable[str]) -> list[str]:
    """Returns the settings that a name is the end of, or whose last part it resembles."""
    if exact := [setting for setting in settings if setting.endswith(f".{name}")]:
        return exact[:2]
    near = get_close_matches(name, {setting.rpartition(".")[2] for setting in settings}, n=1, cutoff=0.8)
    return [setting for setting in settings if setting.rpartition(".")[2] in near][:2]


def _settings(*added: str) -> list[str]:
    """Returns the names of all settings under the groups that are chosen by the command line, as far as it can be composed.

    Args:
        added: choices to take instead of those of their groups.
    """
    from runs.build import flatten  # what builds is not loaded for --help

    instead = {choice.partition("=")[0] for choice in added}
    chosen = [item for item in sys.argv[1:] if re.match(r"[\w/]+=[\w-]+$|~[\w/]+$", item)]
    chosen = [item for item in chosen if item.lstrip("~").partition("=")[0] not in instead]
    running = GlobalHydra.instance().is_initialized()  # in a sweep
    for overrides in (chosen, []):
        try:
            with nullcontext() if running else initialize_config_dir(str(CONF), version_base="1.3"):
                found = OmegaConf.to_container(compose(Path(sys.argv[0]).stem, [*overrides, *added]))
            leaves = [key for name, value in found.items() for key, _ in flatten(value, name)]
            return sorted({".".join(key.split(".")[:depth]) for key in leaves for depth in range(1, key.count(".") + 2)})
        except (HydraException, OmegaConfBaseException):  # one of them may be what is misspelt
            continue
    return []


def _groups() -> list[str]:
    """Returns the names of all groups: of some, nothing is chosen, so that they are no settings."""
    return [str(path.relative_to(CONF)) for path in CONF.rglob("*") if path.is_dir()]
