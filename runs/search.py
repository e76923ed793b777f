"""A search's study on disk (Optuna): what was spent, what was cut off, and what is left of ``n_trials``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, flag_override
from yaml import YAMLError

from runs.commands import as_written
from runs.identity import is_hashed

STUDY = "study.db"  # as conf/hydra/sweeper/search.yaml has it, in the sweep's directory


def is_search(sweeper: DictConfig) -> bool:
    """Whether a sweep's jobs are chosen by Optuna."""
    return str(sweeper._target_).endswith((".OptunaSweeper", ".SearchSweeper"))


def refused_search(sweeper: DictConfig, searched: Sequence[str]) -> str | None:
    """Returns a sentence for a search that would run no trial, or one without end; ``None`` for one that can begin.

    Args:
        sweeper: the config of the plugin.
        searched: names of settings that are searched.
    """
    if sweeper.n_trials < 1:  # an integer, as the plugin has it checked
        return f"hydra.sweeper.n_trials={sweeper.n_trials}: give an integer of at least 1"
    if str(getattr(sweeper.direction, "name", sweeper.direction)) not in ("minimize", "maximize"):
        return f"hydra.sweeper.direction={sweeper.direction}: choose minimize, or maximize to find the worst"
    if not searched:
        return "hydra/sweeper=search has nothing to search: give a setting some values, as in model.beta='interval(1,4)'"
    return None


def other_study(sweeper: DictConfig, overrides: Sequence[str], record: Path) -> str | None:
    """Returns a sentence for a search whose study on disk was another one; ``None`` where it goes on, or there is none.

    Args:
        sweeper: the config of the plugin.
        overrides: the sweep's.
        record: where the overrides of the search before were written down.
    """
    with _study(sweeper) as (storage, study):
        if study is None:
            return None
        trials = storage.get_all_trials(study)
        directions = [direction.name.lower() for direction in storage.get_study_directions(study)]
    from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides
    from optuna.distributions import check_distribution_compatibility

    instead = "give another hydra.sweep.dir, or sweep.fresh=true, which keeps that study aside and begins one"
    direction = getattr(sweeper.direction, "name", sweeper.direction)
    if directions != [direction]:
        return f"hydra.sweeper.direction={direction}: the study {sweeper.storage} was begun to {directions[0]}; {instead}"
    try:
        earlier = as_written(OmegaConf.load(record))
    except (OSError, AttributeError, ValueError, YAMLError):  # none, or half of one that was cut off, which is written again
        earlier = overrides
    fixed, before = (sorted(_fixed(some)) for some in (overrides, earlier))
    if fixed != before:
        now, then = (" ".join(item for item in one if item not in other) for one, other in ((fixed, before), (before, fixed)))
        return f"{now or 'this search'}: the study {sweeper.storage} was begun with {then or 'the default'} instead; {instead}"
    given = (f"{key}={values}" for key, values in (sweeper.params or {}).items())
    space, _ = create_params_from_overrides([*given, *overrides])
    for trial in trials:
        for name in space.keys() & trial.distributions.keys():
            before = trial.distributions[name]
            try:
                check_distribution_compatibility(before, space[name])
            except ValueError:
                return f"{name}: the study {sweeper.storage} has searched other values, {_values(before)}; {instead}"
    return None


def _fixed(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides that all trials share and that their figures depend on."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [one.input_line for one in parsed if not one.is_sweep_override() and is_hashed(one.key_or_group)]


def _values(distribution: Any) -> str:
    """Names what a setting was searched over, as a command line has it."""
    choices = getattr(distribution, "choices", None)
    return f"interval({distribution.low},{distribution.high})" if choices is None else ",".join(map(str, choices))


def go_on(sweeper: DictConfig) -> str:
    """Makes ``n_trials`` the study's total, as the plugin would add as many anew, and hands back the trials that were cut off.

    A trial that still counts as running belongs to a search that was killed: it waits again, and the plugin asks for waiting
    trials first, with the values that they had. So its job is found by its identity and goes on from its checkpoint.

    Args:
        sweeper: the config of the plugin; ``n_trials`` becomes the number of trials that are left.

    Returns:
        What to say about it, a line for the study and one for each trial that was cut off.
    """
    wished = sweeper.n_trials
    with _study(sweeper) as (storage, study):
        trials = [] if study is None else storage.get_all_trials(study)
        cut_off = [trial for trial in trials if trial.state.name == "RUNNING"]
        for trial in cut_off:
            storage.set_trial_state(trial._trial_id, type(trial.state).WAITING)
    spent = sum(trial.state.is_finished() for trial in trials)
    failed = sum(trial.state.name == "FAIL" for trial in trials)
    with flag_override(sweeper, ["readonly", "struct"], False):
        sweeper.n_trials = max(0, wished - spent)
    lines = [
        f"search: {spent} of {wished} trials spent ({failed} failed), {len(cut_off)} interrupted, {sweeper.n_trials} to run"
    ]
    for trial in cut_off:
        values = " ".join(f"{name}={value}" for name, value in trial.params.items())
        lines.append(f"  interrupted, goes on: trial {trial.number}  {values}")
    return "\n".join(lines)


@contextlib.contextmanager
def _study(sweeper: DictConfig) -> Iterator[tuple[Any, int | None]]:
    """Yields (storage, id of the study), the id ``None`` where there is no study yet or it is kept in memory only."""
    if not sweeper.storage:
        yield None, None
        return
    from optuna.storages import RDBStorage

    storage = RDBStorage(str(sweeper.storage))
    try:
        known = {summary.study_name: summary._study_id for summary in storage.get_all_study_summaries()}
        yield storage, known.get(sweeper.study_name)
    finally:
        storage.remove_session()
        storage.engine.dispose()
