"""A sweep as a whole: its plan, how it is stopped, and what became of its jobs."""

from __future__ import annotations

import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from yaml import YAMLError

from runs.commands import as_written
from runs.composing import sentence
from runs.directory import HeldElsewhere, hold, is_held, whole
from runs.entry import INTERRUPTED, refusal, start
from runs.identity import digest, job_name
from runs.lifelines import in_worker, is_lightnings
from runs.search import STUDY, go_on, is_search, other_study, refused_search
from runs.sweep_jobs import (
    BEFORE,
    STATE,
    SWEEP,
    ask_to_stop,
    move_aside,
    not_shared,
    read_state,
    run_or_leave,
    write_state,
    wrong_switch,
)

REFUSED = "refused-"  # in the name of a directory for a combination that makes no config
PLANS = {  # what happens with a job in each state
    "done": "skipped",
    "failed": "tried again",
    "ended": "started again",
    "interrupted": "continued",
    "started": "started again",
    "running elsewhere": "left to the process that runs it",
    "new": "to run",
}


def _plan_of(cfg: DictConfig, state: str) -> str:
    """Returns what will happen with a job."""
    if cfg.sweep.fresh and state not in ("new", "running elsewhere"):
        return "started again, the earlier one kept"
    return "left alone" if state == "failed" and not cfg.sweep.retry_failed else PLANS[state]


class SweepReport(Callback):
    """Says before a sweep what will happen with each job, and after it, or at Ctrl-C, what became of them.

    Attributes:
        latest: the report of the sweep that this process runs; ``None`` before it has begun.
        failed: whether a job of it is not done: then the exit code is not 0.
        searches: whether its jobs are chosen as it goes.
        jobs: how many a grid has, where they are planned or to be planned.
    """

    latest: ClassVar[SweepReport | None] = None
    failed = searches = False
    jobs = 0
    _stopping = False

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints the plan: every job of a grid, or what is left of a search, which chooses its jobs as it goes."""
        if wrong := refused_sweep(config):
            sys.exit(f"error: {wrong}")  # Hydra makes a warning of what else a callback raises, and goes on
        self.directory = Path(str(config.hydra.sweep.dir))
        self.planned: list[Path] = []
        self.impossible: set[tuple[str, ...]] = set()
        try:
            self._begin(config)
        except OSError as error:
            sys.exit(f"error: {refusal(error)}; choose another place by hydra.sweep.dir or paths.output_dir")

    def _begin(self, config: DictConfig) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)  # a sweeper may keep its study there
        SweepReport.latest = self
        signal.signal(signal.SIGTERM, self._stop)
        if "n_jobs" in config.hydra.launcher and callable(signal.getsignal(signal.SIGINT)):  # else it is ignored
            signal.signal(signal.SIGINT, self._stop)
        self.searches = is_search(config.hydra.sweeper)
        if self.searches:
            try:  # until this process ends
                self._held = ExitStack()
                self._held.enter_context(hold(self.directory, wait=0))
            except HeldElsewhere:
                sys.exit(f"error: hydra.sweep.dir={self.directory}: another process is at this search; wait for its end")
            if config.sweep.fresh:
                self._begin_anew()
            elif wrong := other_study(config.hydra.sweeper, as_written(config), self.directory / SWEEP):
                sys.exit(f"error: {wrong}")
            # as the grid's sweeper leaves it: jobs read from it what they share, and so what varies
            with whole(self.directory / SWEEP) as draft:
                OmegaConf.save(OmegaConf.create({"hydra": {"overrides": config.hydra.overrides}}), draft)
            print(f"{go_on(config.hydra.sweeper)}, in {self.directory}", flush=True)
        elif str(config.hydra.sweeper._target_).endswith("GridSweeper"):
            print(f"sweep in {self.directory}", flush=True)
            Console().print(self._plan(config))

    def _begin_anew(self) -> None:
        """Keeps a search's study aside, with all of its jobs; which ones the new study will have, it chooses as it goes."""
        if (self.directory / STUDY).exists():
            move_aside(self.directory / STUDY)
        for directory in self.begun():
            if directory.name.startswith(REFUSED):
                shutil.rmtree(directory)
            elif not is_held(directory):
                move_aside(directory)

    def _plan(self, config: DictConfig) -> Table:
        table = Table()
        for heading in ("job", "state", "plan"):
            table.add_column(heading)
        params = (f"{key}={values}" for key, values in (config.hydra.sweeper.params or {}).items())  # of the config, as Hydra's
        jobs = grid([*params, *as_written(config)])
        self.jobs = len(jobs)
        if not jobs:
            sys.exit("error: this sweep has no jobs: a glob finds nothing, or a list is empty")
        for overrides in jobs:
            directory, cfg = self.composed(overrides, config)
            self.planned.append(directory)
            if cfg is None:
                self.impossible.add(tuple(overrides))
            state, _ = read_state(directory)
            plan = "left out: it cannot be composed" if cfg is None else _plan_of(cfg, state)
            table.add_row(" ".join(not_shared(overrides, as_written(config))), state, plan)
        return table

    def composed(self, overrides: Sequence[str], config: DictConfig) -> tuple[Path, DictConfig | None]:
        """Composes a job of the sweep; one that cannot be composed is a failed one.

        Args:
            overrides: the job's.
            config: the sweep's.

        Returns:
            (directory, config) of the job; (one that holds the reason, ``None``) where it has no config.
        """
        own = not_shared(overrides, as_written(config))
        place = self.directory / f"{REFUSED}{digest(' '.join(own))}"
        known = [item for item in config.hydra.overrides.get("hydra", ()) if item.startswith("+hydra.runtime.choices=")]
        try:
            cfg = compose(config.hydra.job.config_name, overrides=[*overrides, *known], return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            job = job_name(cfg, own)
        except (HydraException, OmegaConfBaseException, ValueError, YAMLError) as error:
            place.mkdir(exist_ok=True)
            write_state(place, "failed", overrides, sentence(error, overrides))
            return place, None
        shutil.rmtree(place, ignore_errors=True)  # it could not be composed once
        return self.directory / job, cfg

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Ends the sweep as Ctrl-C does, once the jobs of its workers have stopped; a second signal does not wait for them."""
        if number == signal.SIGTERM and is_lightnings(self._stop):  # which ends the job that this process trains
            return
        if not self._stopping:
            self._stopping = True
            self._stop_workers()
        raise KeyboardInterrupt

    def _stop_workers(self) -> None:
        """Asks for the end of jobs that workers of this process train, and waits for it: joblib would kill them at once."""
        asked = [path.parent for path in self.directory.glob(f"*/{STATE}") if ask_to_stop(path.parent)]
        while any(is_held(directory) for directory in asked):
            time.sleep(0.1)

    @classmethod
    def refused(cls, overrides: Sequence[str]) -> bool:
        """Whether these overrides of a grid make no config."""
        return cls.latest is not None and tuple(overrides) in cls.latest.impossible

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints what was done and what failed, with its reason."""
        self.summarise()

    def states(self) -> dict[Path, tuple[str, str]]:
        """Returns {directory: (state, reason)} of what was planned and of what has begun, earlier tries left out."""
        return {directory: read_state(directory) for directory in dict.fromkeys([*self.planned, *self.begun()])}

    def begun(self) -> list[Path]:
        """Returns the directories of jobs, earlier tries left out."""
        directories = (path.parent for path in sorted(self.directory.glob(f"*/{STATE}")))
        return [path for path in directories if not re.search(rf"{BEFORE}\d+$", path.name)]

    def done(self) -> bool:
        """Whether any job is done."""
        return any(state == "done" for state, _ in self.states().values())

    def summarise(self) -> None:
        """Prints how many jobs are done, and the others by name, with their state and its reason."""
        states = self.states()
        counts = Counter("not started" if state == "new" else state for state, _ in states.values())
        # Ctrl-C may come before every job has its name; what was begun by an earlier command is known all the same
        unnamed = max(0, min(self.jobs - len(self.planned), self.jobs - len(states)))
        counts += Counter({"not started": unnamed})
        done = counts.pop("done", 0)
        self.failed = bool(counts.keys() - {"ended"})
        rest = "".join(f", {number} {state}" for state, number in counts.items())
        print(f"sweep: {done} of {len(states) + unnamed} jobs done{rest} in {self.directory}", flush=True)
        for directory, (state, reason) in states.items():
            if state not in ("done", "ended", "new"):
                print(f"  {state}: {directory.name}  {reason}", flush=True)


def refused_sweep(config: DictConfig) -> str | None:
    """Returns a sentence for a sweep that its launcher or sweeper would not run, or not as meant; ``None`` if there is none."""
    hydra = config.hydra
    if wrong := wrong_switch(config):
        return wrong
    if own := next((item for item in hydra.overrides.hydra if item.startswith("hydra.run.dir=")), None):
        return f"{own} is the directory of one run, and this is a sweep: give hydra.sweep.dir"
    if own := next((item for item in hydra.overrides.hydra if re.match(r"hydra\.sweep\.subdir=(?!\.$)", item)), None):
        return f"{own}: jobs have names of their own, by which they are found again; leave it out"
    if str(hydra.launcher._target_).endswith("SlurmLauncher") and shutil.which("srun") is None:
        return "hydra/launcher=slurm: this machine has no srun; start the sweep where SLURM is, or choose hydra/launcher=cores"
    at_once = hydra.launcher.get("n_jobs", 1)  # an integer, as the plugin has it checked
    if at_once < 1 and at_once != -1:
        return f"hydra.launcher.n_jobs={at_once}: give an integer of at least 1, or -1 for one a core"
    at_a_time = hydra.sweeper.get("max_batch_size")
    if at_a_time is not None and at_a_time < 1:
        return f"hydra.sweeper.max_batch_size={at_a_time}: give an integer of at least 1, or null for all jobs"
    swept = list(hydra.sweeper.get("params") or {})
    for override in OverridesParser.create().parse_overrides(as_written(config)):
        if override.is_sweep_override():
            swept.append(override.get_key_element())
            if override.is_interval_sweep() and (wrong := _wrong_interval(override.value(), hydra.sweeper)):
                return f"{override.input_line}: {wrong}"
    return refused_search(hydra.sweeper, swept) if is_search(hydra.sweeper) else None


def _wrong_interval(interval: IntervalSweep, sweeper: DictConfig) -> str | None:
    if not is_search(sweeper) or str(sweeper.get("sampler", {}).get("_target_")).endswith("GridSampler"):
        return "a grid takes values, as in 1,2,3; intervals are for hydra/sweeper=search with another sampler than grid"
    if not interval.start < interval.end:
        return "an interval goes from a smaller number to a larger one"
    return "an interval in logarithms begins above 0" if "log" in interval.tags and interval.start <= 0 else None


def run_sweep(main: Callable[[], object]) -> int:
    """Runs a ``hydra.main`` function that is a sweep.

    Returns:
        The exit code: 0, 1 if a job is not done, 130 after Ctrl-C, which ends the sweep and not only its job.
    """
    try:
        start(main)
    except SystemExit as stop:
        if stop.code != INTERRUPTED or SweepReport.latest is None:
            raise
        SweepReport.latest.summarise()
        print("interrupted; the same command goes on", flush=True)
        return INTERRUPTED
    except ValueError as error:
        if SweepReport.latest is None or SweepReport.latest.done():
            raise
        SweepReport.latest.summarise()
        begun = bool(SweepReport.latest.states())
        if not SweepReport.latest.searches or not begun:  # else the plugin looks for the best trial, and there may be none
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if not begun:
            return 1
    except BrokenExecutor:  # joblib then ends the other workers, too
        if SweepReport.latest is None:
            raise
        SweepReport.latest.summarise()
        print(
            "error: the system has ended a worker of this sweep, as where memory runs out, and with it the others: the same "
            "command goes on, with a smaller hydra.launcher.n_jobs if that was it",
            file=sys.stderr,
            flush=True,
        )
        return 1
    return int(SweepReport.latest is not None and SweepReport.latest.failed)


def grid(overrides: Sequence[str]) -> list[list[str]]:
    """Returns the jobs of a grid sweep, as Hydra's basic sweeper has them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    return jobs


def run_in_sweep(cfg: DictConfig, run: Callable[[DictConfig], float]) -> float | None:
    """Runs one job of a sweep, or does not: what was done is skipped, what was interrupted goes on.

    Args:
        cfg: the job's config.
        run: what a single run does with it.

    Returns:
        The job's objective; ``None`` for a job that failed, which ends neither the sweep nor the other jobs.
    """
    with in_worker() if _is_worker() else nullcontext():
        return run_or_leave(cfg, run, Path(HydraConfig.get().runtime.output_dir))


def _is_worker() -> bool:
    """Whether joblib began this process: the sweep's own has a report."""
    return HydraConfig.get().launcher.get("n_jobs") is not None and SweepReport.latest is None
