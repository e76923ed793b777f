"""What every floor asks of the numbers that it is given."""

from __future__ import annotations


def is_whole(value: object, least: int) -> bool:
    """Whether this is an integer of at least ``least``; ``True`` is none, though Python counts it as 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
