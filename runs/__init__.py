"""Floor 4: a run directory: how its parts are built, how it is continued, and what it reports."""

from runs.build import SettingError, build_part, plain
from runs.directory import claim, find_checkpoint, read_checkpoint, same_model
from runs.report import result_record, table

__all__ = [
    "SettingError",
    "build_part",
    "claim",
    "find_checkpoint",
    "plain",
    "read_checkpoint",
    "result_record",
    "same_model",
    "table",
]
