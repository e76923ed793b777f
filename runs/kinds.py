"""Whether settings are of the kind that those who are built from them say they take: numbers, switches, lists of integers.

A word where a number belongs ends in a comparison's traceback, one where true or false belongs counts as true. What the
signatures of classes and functions say is known before any of them is called.
"""

from __future__ import annotations

import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Union

import yaml
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from runs.commands import CONF

NONE = type(None)
NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a word", NONE: "null"}
NODE = "what is built by a _target_"
PLURALS = {int: "integers", float: "numbers", str: "words"}


def wrong_kinds(node: DictConfig, nulls: bool = False) -> Iterator[str]:
    """Yields a sentence for each setting below ``node`` that its ``_target_`` cannot take or does not know, outer ones first.

    Args:
        node: a config with a ``_target_``, or with nodes that have one.
        nulls: whether null where something belongs counts, and something where null does: constructors often say why.
    """
    if absent := _absent(node):
        yield absent
        return
    hints, names = _signature(node)
    for name in node:
        try:
            value = node[name]
            suits = name not in hints or fits(value, hints[name])
        except OmegaConfBaseException:  # missing, or refers to what is: said elsewhere
            continue
        if names is not None and name not in names and str(name)[0] != "_":
            yield unknown(node, name, names)
        elif isinstance(value, DictConfig):
            yield from wrong_kinds(value, nulls)
        elif isinstance(value, ListConfig) and any(OmegaConf.is_config(part) for part in value):
            for part in value:
                if isinstance(part, DictConfig):
                    yield from wrong_kinds(part, nulls)
        elif not suits and (nulls or (value is not None and hints[name] is not NONE)):
            key = node._get_full_key(name)
            group = key.replace(".", "/")
            if (CONF / group / f"{value}.yaml").is_file():
                yield f"{key}={value} is a choice, not a setting: give {group}={value}"
                continue
            wanted = f"{kind(hints[name])}{_quoted(key, value, hints[name])}{_odd_one(node, name, hints[name])}"
            yield f"{key}={_shown(value)}: give {wanted}"


def _shown(value: Any) -> Any:
    """Returns a value as what refers to others comes out."""
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, ListConfig) else value


def _quoted(key: str, value: Any, hint: Any) -> str:
    """Says where quotes are lacking, or are too many."""
    if isinstance(value, (int, float)) and fits(str(value), hint):
        return f", as {key}='\"{value}\"'"
    if isinstance(value, str):
        with suppress(YAMLError):
            if fits(yaml.safe_load(value), hint):
                return ", without quotes"
    return ""


def unknown(node: DictConfig, name: str, names: Iterable[str] = ()) -> str:
    """Returns the sentence for a setting that the node's target does not take, of which it takes ``names``."""
    key, taker = node._get_full_key(name), node._target_.split(".")[-1]
    value = "" if OmegaConf.is_config(node[name]) else f"={node[name]}"
    near = get_close_matches(name, names, n=1, cutoff=0.8)
    advice = f", is it {near[0]}?" if near else f"; ~{key} leaves it out"
    return f"{key}{value}: {taker} takes no such setting{advice}"


def _absent(node: DictConfig) -> str | None:
    """Returns the sentence for a target that is not there; what else importing it raises, building it says."""
    target = node.get("_target_")
    try:
        if isinstance(target, str):
            get_object(target)
    except Exception as error:  # of whatever is imported
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{target}.".startswith(f"{cause.name}."):
            key = node._get_full_key("_target_")
            holder, _, name = cause.name.rpartition(".")
            if not holder:
                return f"{key}={target}: Python finds no module {name}; put it beside {Path(sys.argv[0]).name} or on PYTHONPATH"
            near = get_close_matches(name, dir(get_object(holder)), n=1, cutoff=0.6)
            return f"{key}={target}: {holder} has no {name}{f', is it {near[0]}?' if near else ''}"
    return None


def _signature(node: DictConfig) -> tuple[dict[str, Any], list[str] | None]:
    """Returns the annotations of what the node's target takes by name, and all the names if they are certain.

    There are none of a target that is not there or says nothing. Names are not certain where a target hands on what it does
    not know: not to its parents alone.
    """
    if not isinstance(node.get("_target_"), str):
        return {}, None
    hints: dict[str, Any] = {}
    names = None
    try:
        for number, function in enumerate(_functions(get_object(node["_target_"]))):
            parameters = inspect.signature(function).parameters.values()
            if number == 0 and all(one.kind is not one.VAR_KEYWORD for one in parameters):
                names = [one.name for one in parameters]
            told = typing.get_type_hints(function)
            own = {one.name: told[one.name] for one in parameters if one.name in told}
            own |= {one.name: own[one.name] | None for one in parameters if one.name in own and one.default is None}
            hints = own | hints
            if all(one.kind is not one.VAR_KEYWORD for one in parameters):
                break
    except Exception:  # whatever importing it or looking at it raises, building it says so
        return {}, None
    return hints, names


def _functions(target: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Yields what is called, and those that it hands on to what it does not know: its class's parents, or what it returns."""
    if not isinstance(target, type):
        yield target
        target = typing.get_type_hints(target).get("return")
    for one in target.__mro__ if isinstance(target, type) else ():
        if "__init__" in vars(one):
            yield one.__init__


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a config is what an annotation asks for; where that is none of yaml's kinds, nodes build it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in arguments)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, NONE):
        return isinstance(value, hint)
    outer = origin or hint
    if _is_sequence(outer):
        if not isinstance(value, (ListConfig, list, tuple)):
            return False
        each = _parts(value, hint)
        return not arguments or (len(value) == len(each) and all(map(fits, value, each)))
    if not isinstance(outer, type) or outer in (Any, object) or issubclass(outer, (PathLike, Enum)):
        return True
    return not isinstance(value, (bool, int, float, str, NONE, ListConfig, list))


def _is_sequence(hint: Any) -> bool:
    """Whether a list is what is asked for, and not a class that can be walked as well, as tensors can."""
    builtin = isinstance(hint, type) and hint.__module__ in ("builtins", "collections.abc")
    return builtin and issubclass(hint, Iterable) and not issubclass(hint, Mapping)


def _parts(value: Sequence[Any], hint: Any) -> tuple[Any, ...]:
    """Returns what is asked for of each part of a list; of a tuple, there may be more or fewer than the list has."""
    arguments = typing.get_args(hint)
    return arguments if typing.get_origin(hint) is tuple and ... not in arguments else arguments[:1] * len(value)


def _odd_one(node: DictConfig, name: str, hint: Any) -> str:
    """Returns which part of a list is not as the others should be, in words, and which setting it comes from."""
    value = node[name]
    if not isinstance(value, (ListConfig, list)) or not _is_sequence(typing.get_origin(hint) or hint):
        return ""
    each = _parts(value, hint)
    if len(value) != len(each):
        return ""
    odd = [(i, part) for i, (part, asked) in enumerate(zip(value, each, strict=True)) if not fits(part, asked)]
    if not odd:
        return ""
    raw = value._get_node(odd[0][0])._value() if isinstance(value, ListConfig) else None
    source = f" (of {raw[2:-1]})" if isinstance(raw, str) and raw.startswith("${") else ""
    return f", {odd[0][1]!r}{source} is none"


def _alternatives(hint: Any) -> list[str]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return [str(one) for one in arguments]
    if origin in (Union, types.UnionType):
        return [name for one in arguments if not (one is int and float in arguments) for name in _alternatives(one)]
    return [kind(hint)]


def kind(hint: Any) -> str:
    """Returns in words what an annotation asks for."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType, Literal):
        return " or ".join(dict.fromkeys(_alternatives(hint)))
    if hint in NAMES:
        return NAMES[hint]
    if _is_sequence(origin or hint):
        number = f"{len(arguments)} " if origin is tuple and ... not in arguments else ""
        return f"a list of {number}{_plural(arguments[0])}" if arguments else "a list"
    return NODE


def _plural(hint: Any) -> str:
    """Returns in words what the parts of a list are, where a config can hold one kind of them."""
    arguments = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    plurals = {PLURALS[one] for one in arguments if one in PLURALS and not (one is int and float in arguments)}
    return plurals.pop() if len(plurals) == 1 else "values"
