"""Which job a config describes: the same whatever its paths and names are, so that a sweep finds its jobs again.

Imports no torch: entry points name a sweep's directory before anything is built.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from runs.commands import chosen

DEFINES = ("model", "data", "trainer", "callbacks", "seed")  # what a job's figures depend on; loggers and paths are not in it
# but for these, by which no figure changes
INCIDENTAL = (
    "data.root", "data.download", "data.num_workers", "data.prefetch", "data.verify", "data.max_memory_gb",
    "trainer.enable_progress_bar", "callbacks.pictures", "callbacks.progress", "callbacks.vitals",
)  # fmt: skip
MULTIRUN = {"-m", "--multirun"}
CHOOSE = (*DEFINES, "experiment", "recipe")  # what overrides of the parts that are hashed begin with


def identity(cfg: DictConfig) -> str:
    """Returns eight hexadecimal digits of a hash of the resolved config without paths and names."""
    parts = {}
    for name in DEFINES:
        node = cfg.get(name)
        if not isinstance(node, DictConfig):
            parts[name] = node
            continue
        kept = {key for key in node if f"{name}.{key}" not in INCIDENTAL}
        parts[name] = {
            key: OmegaConf.to_container(node[key], resolve=True) if OmegaConf.is_config(node[key]) else node[key]
            for key in kept
        }
    return digest(json.dumps(parts, sort_keys=True, default=str))


def job_name(cfg: DictConfig, varied: Sequence[str]) -> str:
    """Returns the name of a job's directory in its sweep: model, data, seed and identity.

    Args:
        cfg: the job's config.
        varied: its overrides that not all jobs of the sweep share. Where the sweep goes over what is not in the identity
            (``ckpt``, ``data.root``), their digest joins the name, since two values are two jobs to whoever asks for both.
    """
    beside = sorted(item.lstrip("+") for item in varied if not is_hashed(re.split("[=@]", item.lstrip("+~"))[0]))
    suffix = f"-{digest(' '.join(beside))}" if beside else ""
    return f"{chosen(cfg, 'model')}-{chosen(cfg, 'data')}-s{cfg.seed}-{identity(cfg)}{suffix}"


def is_hashed(key: str) -> bool:
    """Whether an override's value is in :func:`identity`."""
    incidental = any(f"{key}.".startswith(f"{name}.") for name in INCIDENTAL)
    return re.split("[./]", key)[0] in CHOOSE and not incidental


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether a command line starts a sweep."""
    return bool(MULTIRUN & set(arguments)) or any(re.fullmatch(r"hydra\.mode=(RunMode\.)?MULTIRUN", item) for item in arguments)


def with_sweep_directory(arguments: Sequence[str]) -> list[str]:
    """Adds the directory of a sweep to a command line: one that the same sweep finds again.

    Single runs, and sweeps whose directory is given, stay as they are. Launchers, how many jobs run at once and what is done
    with jobs of an earlier try do not make another sweep.
    """
    first = [item for item in arguments if item in MULTIRUN]  # between overrides, argparse would not know those after it
    arguments = [*arguments[:1], *first, *(item for item in arguments[1:] if item not in MULTIRUN)]
    if not is_sweep(arguments) or any(item.startswith("hydra.sweep.dir=") for item in arguments):
        return arguments
    incidental = (
        "-",
        "hydra.mode=",
        "hydra.runtime.",
        "hydra/launcher=",
        "hydra.launcher.",
        "sweep.",
        "paths.",
        "logger",
        "compile=",
        "hydra.sweeper.n_trials=",
    )
    what = sorted(item for item in arguments[1:] if not item.lstrip("+~").startswith(incidental))
    varied = [item.split("=")[0].lstrip("+~").replace("/", ".").split(".")[-1] for item in what if re.search(r"=.*[,(]", item)]
    name = "-".join([*varied, digest("\n".join(what))])
    # beside another override: argparse wants all of them together, wherever -m stands
    place = next((i for i, item in enumerate(arguments) if i and re.match(r"[^-].*=|~", item)), len(arguments))
    return [*arguments[:place], f"hydra.sweep.dir=${{paths.output_dir}}/sweeps/{name}", *arguments[place:]]


def digest(text: str) -> str:
    """Returns eight hexadecimal digits that stand for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def with_choices(arguments: Sequence[str]) -> list[str]:
    """Has a sweep look at a setting of what it goes over once a job has chosen: ``model=vae,mhvae model.latent_dim=8``.

    Hydra composes a sweep's own config with its fixed overrides alone, where ``model`` is still the default one.
    """
    places = [i for i, item in enumerate(arguments) if i and re.match(r"\+{0,2}[^-~+=]+=.+", item)]
    try:
        parsed = OverridesParser.create().parse_overrides([arguments[i] for i in places])
    except HydraException:  # which says so itself
        return list(arguments)
    swept = [f"{one.get_key_element().replace('/', '.')}." for one in parsed if one.is_sweep_override()]
    changed = list(arguments)
    for place, one in zip(places, parsed, strict=True):
        name = one.key_or_group.replace("/", ".")
        chosen = "experiment." in swept and name.split(".")[0] in DEFINES and name not in DEFINES
        if not one.is_sweep_override() and (chosen or name.startswith(tuple(swept))):
            key, _, value = arguments[place].partition("=")
            changed[place] = f"{key}=choice({value})"
    return changed
