"""Makes each rank that Lightning launches run exactly its parent's job, also in a sweep.

Lightning starts a rank by running the command line again. In a sweep that would be the whole sweep again, with jobs in lockstep
by luck or with other hyperparameters; under joblib and submitit the command line is the worker's. And what Lightning puts into
the environment for its ranks would make the next job believe that it is one of them.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import flag_override

from runs.commands import config_flags
from runs.lifelines import BEGUN_BY

VARIABLES = (
    "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED", "PL_SEED_WORKERS", "SLURM_NTASKS",
    BEGUN_BY,
)  # fmt: skip
OF_THE_SWEEP = ("hydra.mode", "hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweeper", "hydra.sweep.")


@contextlib.contextmanager
def one_job(script: Path, directory: Path, extra: tuple[str, ...] = ()) -> Iterator[None]:
    """Inside the block, ranks are launched as a single run of this job in ``directory``; after it nothing of them is left.

    Args:
        script: the entry point.
        directory: the job's, which all its ranks share.
        extra: overrides besides the job's own, as ``ckpt=last`` for a job that goes on.
    """
    import __main__

    hydra = HydraConfig.get()
    environment = {name: os.environ.get(name) for name in VARIABLES}
    arguments, spec, run_directory = list(sys.argv), __main__.__spec__, hydra.run.dir
    own = [item for item in hydra.overrides.hydra if not item.lstrip("+~").startswith(OF_THE_SWEEP)]
    if environment["SLURM_NTASKS"] == "1":  # one task a job, as conf/hydra/launcher/slurm.yaml has it:
        del os.environ["SLURM_NTASKS"]  # Lightning would wait for SLURM to start the other ranks
    try:
        sys.argv = [str(script), *config_flags(), *hydra.overrides.task, *own, *extra]
        os.environ[BEGUN_BY] = str(os.getpid())
        __main__.__spec__ = None  # or Lightning would run the worker's module
        with flag_override(hydra, ["readonly", "struct"], False):
            hydra.run.dir = str(directory)
        yield
    finally:
        sys.argv, __main__.__spec__ = arguments, spec
        with flag_override(hydra, ["readonly", "struct"], False):
            hydra.run.dir = run_directory
        _leave_process_group()
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _leave_process_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
