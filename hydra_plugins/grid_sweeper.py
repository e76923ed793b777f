"""The sweeper of grids: Hydra's, but a combination that cannot be composed stops no other.

Hydra looks for sweepers in packages of this name alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override

from runs.sweep import SweepReport


class GridSweeper(BasicSweeper):
    """Leaves out the jobs that :class:`runs.sweep.SweepReport` has found to be none; that report lists them as failed."""

    @staticmethod
    def split_arguments(overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """Returns the jobs, each a list of overrides, in batches, none of them empty: submitit takes no such one."""
        (jobs,) = BasicSweeper.split_arguments(overrides, None)
        jobs = [job for job in jobs if not SweepReport.refused(job)]
        return list(BasicSweeper.split_overrides_to_chunks(jobs, max_batch_size)) if jobs else []

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """The report has composed every job already."""
