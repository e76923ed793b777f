"""The sweeper of searches: Optuna's, but a trial that cannot be composed is a failed one, and the search goes on.

Hydra looks for sweepers in packages of this name alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from runs.sweep import SweepReport

try:
    from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper
except ImportError:  # pip install -e '.[optuna]'; Hydra imports this module for every command
    pass
else:

    class SearchSweeper(OptunaSweeper):
        """Leaves out the trials that :class:`runs.sweep.SweepReport` finds to be no jobs; that report lists them as failed.

        Each launcher composes the jobs that it is given, and ends the search where one makes no config: the trial would count
        as cut off, and be asked for again by every later start.
        """

        def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
            """Wraps the launcher of the sweep."""
            super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
            launch = self.sweeper.launcher.launch

            def launch_what_can_be_composed(jobs: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
                sound = [SweepReport.latest.composed(job, config)[1] is not None for job in jobs]
                launched = [job for job, whole in zip(jobs, sound, strict=True) if whole]
                returns = iter(launch(launched, initial_job_idx=initial_job_idx) if launched else ())
                return [next(returns) if whole else JobReturn(status=JobStatus.COMPLETED) for whole in sound]

            self.sweeper.launcher.launch = launch_what_can_be_composed
