"""Runs that differ in their seed alone, and how sure one can be which group is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from comparison.collect import Run
from runs.build import SettingError

LEVEL = 0.95  # of the confidence intervals


@dataclass(frozen=True)
class Group:
    """Runs with the same settings but for the seed.

    Attributes:
        values: the settings that tell groups apart, by name.
        runs: finished, by seed.
        figures: the metric of each run.
        difference: mean paired difference to the best group over common seeds, and half the width of its confidence interval;
            (0, 0) for the best itself, NaN where fewer than two seeds are common.
        common_seeds: how many seeds that is taken over.
    """

    values: dict[str, Any]
    runs: list[Run]
    figures: list[float]
    difference: tuple[float, float] = (0.0, 0.0)
    common_seeds: int = 0

    @property
    def mean(self) -> float:
        """Mean of the metric over the runs."""
        return float(np.mean(self.figures))

    @property
    def deviation(self) -> float:
        """Standard deviation over the runs; NaN for one."""
        return float(np.std(self.figures, ddof=1)) if len(self.figures) > 1 else math.nan

    @property
    def label(self) -> str:
        """The settings in a few words."""
        return ", ".join(f"{_short(key)}={value}" for key, value in self.values.items()) or self.runs[0].name

    def average(self, of) -> float | None:
        """Returns the mean of a number of each run, or ``None`` where one has none."""
        found = [of(run) for run in self.runs]
        return None if any(value is None for value in found) else float(np.mean(found))


def _short(key: str) -> str:
    return key.replace("/", ".").split(".")[-1]


def varied_settings(runs: Sequence[Run]) -> list[str]:
    """Returns what varies over runs: groups whose choice differs, and settings that differ otherwise; never the seed."""
    choices = sorted({key for run in runs for key in run.choices if "hydra" not in key and "@" not in key})
    chosen = [key for key in choices if len({run.choices.get(key) for run in runs}) > 1]
    chosen = [key for key in chosen if not any(key.startswith(f"{outer}/") for outer in chosen)]
    within = tuple(f"{key.replace('/', '.')}." for key in chosen)  # what the choice itself brought along
    keys = sorted({key for run in runs for key in run.settings} - {"seed", "overrides"})
    differing = [key for key in keys if len({repr(run.settings.get(key)) for run in runs}) > 1]
    return [*chosen, *(key for key in differing if not key.startswith(within) and not _follows(key, differing))]


def _follows(key: str, differing: Sequence[str]) -> bool:
    """Whether a setting only repeats another that differs, as the model repeats the data's shape and levels."""
    repeats = {"model.levels": "data.levels", "model.image_shape": "data.image_shape", "model.likelihood.levels": "data.levels"}
    return repeats.get(key) in differing


def value_of(run: Run, key: str) -> Any:
    """Returns a choice (``model/schedule``) or a setting (``model.num_steps``) of a run."""
    if key in run.choices:
        return run.choices[key]
    value = run.settings.get(key.replace("/", "."))
    return tuple(value) if isinstance(value, list) else value


def group(runs: Sequence[Run], by: Sequence[str] | None, metric: str) -> list[Group]:
    """Groups finished runs, best first.

    Args:
        runs: finished ones.
        by: what to group by; ``None`` finds what varies.
        metric: name of the figure; lower is better, but for ``elbo`` and ``reconstruction``.

    Raises:
        SettingError: if a key of ``by`` or the metric is unknown to every run.
    """
    keys = list(by) if by else varied_settings(runs)
    for key in keys:
        if all(value_of(run, key) is None for run in runs):
            raise SettingError(
                f"by={key} is no setting of these runs: what varies is {', '.join(varied_settings(runs)) or 'nothing'}"
            )
    measured = [run for run in runs if isinstance(run.metric(metric), (int, float)) and math.isfinite(run.metric(metric))]
    if not measured:
        known = sorted({name for run in runs for name in run.result.get("metrics", {})})
        raise SettingError(f"metric={metric} is in none of these runs: choose among {', '.join(['val/bpd', *known])}")
    sign = -1 if metric.split("/")[-1] in ("elbo", "reconstruction") else 1
    members: dict[str, list[Run]] = {}
    for run in measured:
        members.setdefault(repr([value_of(run, key) for key in keys]), []).append(run)
    groups = []
    for own in members.values():
        own = sorted(own, key=lambda run: (str(run.seed), run.name))
        groups.append(Group({key: value_of(own[0], key) for key in keys}, own, [run.metric(metric) for run in own]))
    groups.sort(key=lambda one: sign * one.mean)
    return [groups[0], *(_against(groups[0], other) for other in groups[1:])]


def _against(best: Group, other: Group) -> Group:
    """Adds the paired difference to the best group, with a t interval."""
    ours = {run.seed: figure for run, figure in zip(best.runs, best.figures, strict=True)}
    pairs = [figure - ours[run.seed] for run, figure in zip(other.runs, other.figures, strict=True) if run.seed in ours]
    half = math.nan
    if len(pairs) > 1:
        half = float(stats.t.ppf(0.5 + LEVEL / 2, len(pairs) - 1) * np.std(pairs, ddof=1) / math.sqrt(len(pairs)))
    mean = float(np.mean(pairs)) if pairs else math.nan
    return Group(other.values, other.runs, other.figures, (mean, half), len(pairs))
