"""Floor 4: a run directory: how its parts are built, how it is continued, what it reports, and sweeps of many.

Imports nothing here: entry points ask parts of it before torch is needed.
"""
