"""Measurements: cost and noise of what the framework does, as ratios of two things timed in one run."""
