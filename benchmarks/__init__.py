"""Measurements: cost and noise of what the framework does, as ratios of two things timed in one run."""

from runs.entry import spin_briefly

spin_briefly()  # as train.py does, before torch is loaded
