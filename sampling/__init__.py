"""Floor 4: images drawn from saved runs."""

from sampling.job import draw

__all__ = ["draw"]
