"""The sweeper of grids: Hydra's, but a combination that cannot be composed stops no other.

Hydra looks for sweepers in packages of this name alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from runs.sweep import SweepReport


class GridSweeper(BasicSweeper):
    """Leaves out the jobs that :class:`runs.sweep.SweepReport` has found to be none; that report lists them as failed."""

    def get_job_batch(self) -> Sequence[Sequence[str]]:
        """Returns the next jobs, each a list of overrides."""
        return [overrides for overrides in super().get_job_batch() if not SweepReport.refused(overrides)]

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """The report has composed every job already."""
