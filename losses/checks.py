"""What every floor asks of the numbers that it is given."""

from __future__ import annotations

import math

MOST_LAYERS = 10_000  # of one kind: more would be built for minutes before anything is said


def is_whole(value: object, least: int, most: float = math.inf) -> bool:
    """Whether this is an integer from ``least`` to ``most``; ``True`` is none, though Python counts it as 1."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
