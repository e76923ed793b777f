"""What Hydra refuses as it composes a config, told in one sentence."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from yaml import MarkedYAMLError, YAMLError

from runs.commands import CONF
from runs.names import no_setting

LEFT_OUT = ("callbacks", "logger", "model/lr_scheduler", "model/optimizer")  # groups that a run may be without


def is_of_composing(error: BaseException) -> bool:
    """Whether Hydra raised an error of another library's kind, of what is chosen or of a file: its own are all of composing."""
    if isinstance(error, YAMLError):
        return True
    if isinstance(error, UnicodeDecodeError):
        return _file_of(error) is not None
    return isinstance(error, ValueError) and str(error).startswith(("Config group override must be", "Invalid defaults list"))


def sentence(error: BaseException, overrides: Sequence[str] | None = None) -> str:
    """Returns an error's text in one line, without where Hydra searched and what it says of itself.

    Args:
        error: of composing a config.
        overrides: of the job; by default the command line's.
    """
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        where = f"{error.problem_mark.name.strip('<>')}, line {error.problem_mark.line + 1}"
        return f"{where}: {' '.join((error.problem or str(error)).split())}"
    if isinstance(error, UnicodeDecodeError):
        return f"{_file_of(error)}: it is not text in UTF-8, which configs are; {error.reason} at byte {error.start + 1}"
    if isinstance(error, OverrideParseException):
        run = {"evaluate": "run=", "sample": "run=", "compare": "runs="}.get(Path(sys.argv[0]).stem)
        if run and "=" not in str(error.override):
            return f"{error.override} is not KEY=VALUE: write {run}{error.override}"
        return (
            f"{error.override} is not KEY=VALUE as Hydra reads it; a value with signs in it takes quotes within quotes, as in "
            "'KEY=\"VALUE\"'"
        )
    told = error
    while not str(told) and told.__cause__:
        told = told.__cause__
    text = str(told).split("Config search path")[0].split("Set the environment variable")[0].split("See https://hydra.cc")[0]
    text = " ".join(text.split())
    if text.startswith("Error merging override") and error.__cause__:
        text = f"{text.removeprefix('Error merging override ')}: {str(error.__cause__).splitlines()[0]}"
    if referred := re.match(r"Error resolving interpolation '\$\{(\w+)\}'", text):  # in a list of defaults
        return f"{referred[1]} is missing: choose one, as python {Path(sys.argv[0]).name} --help lists them"
    if "Config group override must be" in text:
        return _no_choice(sys.argv[1:] if overrides is None else overrides)
    absent = re.match(r"Could not override '(\w+)/([^']+)'\. No match in the defaults list\. .* use (\S+)", text)
    if absent:
        return f"{absent[1]}/{absent[2]}: the {absent[1]} that is chosen has none; {absent[3]} adds one, where it takes one"
    filled = re.match(r"Could not override '(\w+)'\. No match in the defaults list\. .* use (\S+)", text)
    if filled and {"--config-name", "-cn"} & {item.partition("=")[0] for item in sys.argv}:  # as of a run's config.yaml
        return (
            f"{filled[1]}: the config that was named chooses none, but has settings: change those, as in "
            f"{filled[1]}.NAME=VALUE; {filled[2]} would put all that this choice sets over them"
        )
    unknown = re.match(r"Could not override '([^']+)'\. To append to your config use (\S+)", text)
    if unknown is None:
        return text
    return no_setting(unknown[1], unknown[2])


def _file_of(error: UnicodeDecodeError) -> str | None:
    """Returns the config that Hydra was reading, which only its own frame knows."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return next((str(frame.f_locals["full_path"]) for frame in frames if "full_path" in frame.f_locals), None)


def _no_choice(overrides: Sequence[str]) -> str:
    """Says what is chosen of a group, where it was no name, and how a group is left out, of which Hydra takes no null."""
    for override in overrides:
        name, sign, value = override.lstrip("+").partition("=")
        group = name.partition("@")[0]
        if sign and (CONF / group).is_dir() and not isinstance(_value(override), (str, list)):
            break
    else:
        return "what is chosen of a group is a name, and a config chooses null or a number"
    entries = OmegaConf.load(CONF / f"{Path(sys.argv[0]).stem}.yaml").defaults
    unset = any(not isinstance(entry, str) and entry.get(group, "") is None for entry in entries)
    names = " or ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
    advice = "name one, or leave it out" if group.startswith("hydra/") else f"give {names}"  # of those, Hydra has more
    if value in ("null", "~", ""):
        if unset:
            advice = "leave it out, as nothing is chosen of it by itself"
        elif group in LEFT_OUT:
            advice = f"~{group} leaves it out"
    return f"{override}: what is chosen of {group} is a name; {advice}"


def _value(override: str) -> Any:
    """Returns the value of an override as Hydra reads it."""
    try:
        return OverridesParser.create().parse_override(override).value()
    except HydraException:
        return None
