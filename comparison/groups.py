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
from runs.directory import higher_is_better

LEVEL = 0.95  # of the confidence intervals
# where and how a run was computed, and how its pictures are drawn: by design that changes no figure, so it tells no groups
# apart unless by= asks for it
WHERE = (
    "model.sampler",
    "trainer._target_", "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.plugins",
    "trainer.inference_mode", "trainer.log_every_n_steps", "trainer.enable_model_summary",
)  # fmt: skip

IMAGES = (  # of a protocol
    "dataset", "image_shape", "levels", "binarization", "split_seed", "std", "num_test", "num_tested", "tested_seed",
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Runs with the same settings but for the seed.

    Attributes:
        values: the settings that tell groups apart, by name.
        runs: finished, by seed.
        figures: the metric of each run.
        difference: mean paired difference to the best group on the same images over common seeds, and half the width of its
            confidence interval; (0, 0) for the best itself, NaN where fewer than two seeds are common.
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
    def names(self) -> list[str]:
        """The settings' names, by their last words where these tell them apart."""
        ends = [_short(key) for key in self.values]
        return [end if ends.count(end) == 1 else key for end, key in zip(ends, self.values, strict=True)]

    @property
    def is_best(self) -> bool:
        """Whether no other group that was tested on the same images is better."""
        return self.difference == (0.0, 0.0) and not self.common_seeds

    @property
    def label(self) -> str:
        """The settings in a few words."""
        parts = [f"{name}={value}" for name, value in zip(self.names, self.values.values(), strict=True) if value is not None]
        return ", ".join(parts) or (self.runs[0].name if len(self.runs) == 1 else "all runs")

    def average(self, of) -> float | None:
        """Returns the mean of a number of each run, or ``None`` where one has none."""
        found = [of(run) for run in self.runs]
        return None if any(value is None for value in found) else float(np.mean(found))


def _short(key: str) -> str:
    return key.replace("/", ".").split(".")[-1]


def shown(value: Any) -> str:
    """Returns a setting as it is printed; what a run does not have is a dash."""
    return "–" if value is None else str(value)


def _same(value: Any) -> str:
    """Returns what equal settings share: 1 and 1.0 are one value."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return repr(float(value)) if number and abs(value) < 2**53 else repr(value)


def varied_settings(runs: Sequence[Run]) -> list[str]:
    """Returns what varies over runs: groups whose choice differs, and settings that differ otherwise.

    Never the seed, nor where a run was computed (:data:`WHERE`). What a choice brought along is not repeated: model/network and
    model.levels where the data alone decides them. It is named where it differs between runs of the same choice.
    """
    chosen: list[str] = []
    choices = {key for run in runs for key in run.choices if "@" not in key and not _is_where(key.replace("/", "."))}
    choices -= {"logger", "trainer"}
    if not all(run.choices for run in runs):  # of a run that has none, as one by another's config.yaml, the settings tell
        choices = set()
    for key in sorted(choices, key=lambda key: (key != "experiment", key.count("/"), key)):  # what decides others comes first
        if _differ([run.choices.get(key) for run in runs]) and not _implied(runs, key, chosen):
            chosen.append(key)
    keys = sorted({key for run in runs for key in run.settings} - {"seed", "overrides"})
    differing = [key for key in keys if not _is_where(key) and _differ([run.settings.get(key) for run in runs])]
    differing = [key for key in differing if not _implied(runs, key, chosen) and not _follows(key, differing)]
    return [*sorted(chosen), *differing]


def _is_where(key: str) -> bool:
    return f"{key}.".startswith(tuple(f"{name}." for name in WHERE))


def _differ(values: Sequence[Any]) -> bool:
    return len({_same(value) for value in values}) > 1


def _implied(runs: Sequence[Run], key: str, chosen: Sequence[str]) -> bool:
    """Whether the choices that bear on a choice or setting leave nothing of it open in these runs."""
    place = key.replace("/", ".")
    bearing = [
        choice
        for choice in chosen
        if choice == "experiment"
        or place.startswith(f"{choice.replace('/', '.')}.")
        or (choice.split("/")[0] == "data" and place.startswith(("data.", "model.")))
    ]
    values: dict[tuple, set[str]] = {}
    for run in runs:
        values.setdefault(tuple(run.choices.get(choice) for choice in bearing), set()).add(_same(value_of(run, key)))
    return bool(bearing) and all(len(own) == 1 for own in values.values())


def _follows(key: str, differing: Sequence[str]) -> bool:
    """Whether a setting only repeats another that differs, as the model repeats the data's shape and levels."""
    repeats = {"model.levels": "data.levels", "model.image_shape": "data.image_shape", "model.likelihood.levels": "data.levels"}
    return repeats.get(key) in differing


def value_of(run: Run, key: str) -> Any:
    """Returns a choice (``model/schedule``) or a setting (``model.num_steps``) of a run; ``None`` if it has no such thing."""
    if key in run.choices:
        return run.choices[key]
    place = key.replace("/", ".")
    value = run.settings.get(place, run.beside.get(place))
    if value is None and place in run.settings:
        return "null"  # as it was set, and as it may mean much: every step, no limit
    return tuple(value) if isinstance(value, list) else value


def group(runs: Sequence[Run], by: Sequence[str] | None, metric: str) -> list[Group]:
    """Groups finished runs, best first among those that were tested on the same images.

    Args:
        runs: finished ones.
        by: what to group by; ``None`` finds what varies.
        metric: name of the figure; lower is better, but for ``elbo`` and ``reconstruction``.

    Raises:
        SettingError: if a key of ``by`` or the metric is unknown to every run.
    """
    for key in by or ():
        if all(value_of(run, key) is None for run in runs):
            raise SettingError(
                f"by={key} is no setting of these runs: what varies is {', '.join(varied_settings(runs)) or 'nothing'}"
            )
    measured = [run for run in runs if isinstance(run.metric(metric), (int, float)) and math.isfinite(run.metric(metric))]
    if not measured:
        known = sorted({name for run in runs for name in run.result.get("metrics", {})})
        known = [name for name in ("val/bpd", *known) if any(run.metric(name) is not None for run in runs)]
        raise SettingError(f"metric={metric} is in none of these runs: choose among {', '.join(known) or 'none'}")
    keys = list(by) if by else varied_settings(measured)
    sign = -1 if higher_is_better(metric) else 1
    members: dict[str, list[Run]] = {}
    for run in measured:
        members.setdefault(repr([_same(value_of(run, key)) for key in keys]), []).append(run)
    groups = []
    for own in members.values():
        own = sorted(own, key=lambda run: (len(str(run.seed)), str(run.seed), run.name))
        groups.append(Group({key: value_of(own[0], key) for key in keys}, own, [run.metric(metric) for run in own]))
    groups.sort(key=lambda one: sign * one.mean)
    return [other if other is own[0] else _against(own[0], other) for own in _sets(groups) for other in own]


def pooled_settings(groups: Sequence[Group]) -> list[str]:
    """Returns what varies within a group, as it may where one has said what to group by."""
    return sorted({key for own in groups for key in varied_settings(own.runs)})


def tested_on(run: Run) -> tuple[str, str]:
    """Returns what is equal for runs whose figures can be compared, the images they were tested on, and a name for people."""
    protocol = run.result.get("protocol", {})
    protocol = {"num_tested": protocol.get("num_test"), **protocol}  # earlier versions tested all
    key = repr([(key, value) for key, value in sorted(protocol.items()) if key in IMAGES or key.endswith("sha256")])
    number, shape = protocol["num_tested"], protocol.get("image_shape", "?")
    of = f" of {protocol['num_test']}" if number != protocol.get("num_test") else ""
    return key, f"{protocol.get('dataset', 'unknown')} ({number}{of} images, {'x'.join(map(str, shape))})"


def _sets(groups: Sequence[Group]) -> list[list[Group]]:
    """Returns the groups by the images they were tested on; all in one where a group's own runs were tested on several."""
    sets: dict[tuple[str, str], list[Group]] = {}
    for own in groups:
        first, *others = dict.fromkeys(tested_on(run) for run in own.runs)
        if others:
            return [list(groups)]
        sets.setdefault(first[::-1], []).append(own)
    return [sets[name] for name in sorted(sets)]


def other_images(groups: Sequence[Group]) -> str | None:
    """Returns on which images runs were tested, if not all on the same, and what their order then means."""
    kinds = dict(tested_on(run) for own in groups for run in own.runs)
    if len(kinds) < 2:
        return None
    ranked = "each ranked by itself" if len(_sets(groups)) > 1 else "so these figures rank no models"
    same = len(set(kinds.values())) < len(kinds)
    return f"tested on other images, {ranked}: {'; '.join(sorted(set(kinds.values())))}" + (
        "; of one name, but other files, splits, levels or binarisation" * same
    )


def other_matching(groups: Sequence[Group]) -> str | None:
    """Returns whose matching term is a log ratio of drawn chains, if that of others is a sum of KLs."""
    drawn = [own.label for own in groups if any(run.result.get("protocol", {}).get("consistency") for run in own.runs)]
    if not 0 < len(drawn) < len(groups):
        return None
    return f"matching is Σ ln q/p along drawn chains, which compares with no sum of KLs, of: {'; '.join(drawn)}"


def _by_seed(group: Group) -> dict[str, float]:
    """Returns the mean figure of each seed: a group that pools settings has several runs of one."""
    figures: dict[str, list[float]] = {}
    for run, figure in zip(group.runs, group.figures, strict=True):
        figures.setdefault(str(run.seed), []).append(figure)
    return {seed: float(np.mean(own)) for seed, own in figures.items()}


def _against(best: Group, other: Group) -> Group:
    """Adds the paired difference to the best group, with a t interval."""
    ours, theirs = _by_seed(best), _by_seed(other)
    pairs = [figure - ours[seed] for seed, figure in theirs.items() if seed in ours]
    half = math.nan
    if len(pairs) > 1:
        half = float(stats.t.ppf(0.5 + LEVEL / 2, len(pairs) - 1) * np.std(pairs, ddof=1) / math.sqrt(len(pairs)))
    mean = float(np.mean(pairs)) if pairs else math.nan
    return Group(other.values, other.runs, other.figures, (mean, half), len(pairs))
