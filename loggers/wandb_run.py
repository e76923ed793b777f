"""A W&B run that never asks, never waits without an account, and always ends."""

from __future__ import annotations

import contextlib
import netrc
import os
import secrets
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

MODES = ("online", "offline", "disabled", "shared")
REACH_SECONDS = 3.0  # for a connection, before wandb is asked at all
INIT_SECONDS = 20.0  # wandb itself would try for 100 s and then end the run
FINISH_SECONDS = 60.0  # for uploads at the end; by default a server that died keeps the run from ending
STEP = "trainer/global_step"  # Lightning's name for the optimiser step
BEST = {"val/bpd": "min", "test/bpd": "min", "val/elbo": "max", "test/elbo": "max"}  # the summary; continuous data has no bpd


def choose_mode(mode: str | None) -> tuple[str, str]:
    """Returns (mode, why): the config's, else WANDB_MODE's, else online if there is a key and the server answers.

    Raises:
        ValueError: if the mode is unknown.
    """
    for source, asked in (("logger.mode", mode), ("WANDB_MODE", os.environ.get("WANDB_MODE"))):
        if asked:
            asked = {"dryrun": "offline", "run": "online"}.get(asked, asked)
            if asked not in MODES:
                raise ValueError(f"{source}={asked} is unknown: choose one of {', '.join(MODES)}")
            if asked != "online" or _has_key():
                return asked, f"{source}={asked}"
            return "offline", f"{source}=online, but there is no API key (wandb login)"
    if not _has_key():
        return "offline", "no API key"
    if not _reachable():
        return "offline", f"{_server().hostname} does not answer"
    return "online", "an API key was found"


def _server():
    return urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(_server().hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _reachable() -> bool:
    server = _server()
    if getproxies().get(server.scheme):
        return True  # nobody is reached directly here: wandb finds out
    try:
        address = (server.hostname, server.port or (443 if server.scheme == "https" else 80))
        socket.create_connection(address, timeout=REACH_SECONDS).close()
    except OSError:
        return False
    return True


class EnduringWandbLogger(WandbLogger):
    """A WandbLogger whose failures end no run: the first is said in one line, and the run directory has all."""

    failed = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs what W&B takes."""
        try:
            super().log_metrics(metrics, step)
        except Exception as error:  # of any kind: its own process may be gone, or a table want an answer of the server
            if not self.failed:
                print(
                    f"W&B missed {', '.join(metrics)} ({_brief(error)}), and perhaps more: the run directory has all",
                    flush=True,
                )
            self.failed = True

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Logs the best figure that a checkpoint has been kept by, which the summary has as a plain number.

        A W&B sweep looks for one, and ``define_metric`` with min or max leaves none: val/bpd is {"min": ...} there.
        """
        super().after_save_checkpoint(checkpoint_callback)
        if checkpoint_callback.best_model_score is not None:
            best = {f"best/{checkpoint_callback.monitor}": float(checkpoint_callback.best_model_score)}
            self.log_metrics(best, checkpoint_callback._last_global_step_saved)


def wandb_logger(
    save_dir: str,
    project: str,
    name: str,
    group: str | None = None,
    job_type: str = "train",
    tags: Sequence[str] = (),
    entity: str | None = None,
    mode: str | None = None,
    config: dict[str, Any] | None = None,
    id_file: str | None = None,
) -> WandbLogger:
    """Starts a W&B run and says in one line where it goes.

    Args:
        save_dir: all runs share ``save_dir/wandb``, so that one ``wandb sync`` uploads everything.
        project: W&B project.
        name: run name.
        group: runs to compare.
        job_type: what W&B files the run under.
        tags: the choices made.
        entity: W&B user or team.
        mode: online, offline, disabled or shared; by default see :func:`choose_mode`.
        config: the run's resolved config, sent at the start.
        id_file: holds the run's id, so that a run that goes on goes on in W&B too; written if it is not there.

    Raises:
        ValueError: if W&B refuses what it is given, and no server is to blame.
    """
    mode, why = choose_mode(mode)
    if not os.environ.get("WANDB_MODE"):  # an empty one is none, but wandb itself would refuse it
        os.environ.pop("WANDB_MODE", None)
    os.makedirs(save_dir, exist_ok=True)
    common = {
        "save_dir": save_dir, "project": project, "name": name, "entity": entity, "group": group, "job_type": job_type,
        "tags": list(tags), "config": config, "id": _kept_id(id_file) or secrets.token_hex(4),
    }  # fmt: skip
    try:
        logger = _start(mode, **common)
    except Exception as error:
        if mode not in ("online", "shared"):
            raise ValueError(f"W&B starts no {mode} run: {_brief(error)}") from error
        _forget_server()  # whatever wandb raises: a logger ends no run
        mode, why = "offline", f"{why}, but {_server().netloc} started no run: {_brief(error)}"
        logger = _start(mode, **common)
    for metric, best in BEST.items():
        logger.experiment.define_metric(metric, step_metric=STEP, summary=best)
    # every row holds it, so that a dashboard may take it as its x axis instead
    logger.experiment.define_metric("images_seen", step_metric=STEP, summary="max")
    later = f"; upload later with: wandb sync {shlex.quote(save_dir)}/wandb/offline-run-*" if mode == "offline" else ""
    print(f"W&B: {mode} ({why}){later}", flush=True)
    return logger


def _start(mode: str, **common: Any) -> WandbLogger:
    """Returns a logger whose run is started: its config is recorded before training does anything."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb's reports of itself wait 20 s for a dead server at exit
    if os.name == "posix" and not os.environ.get("HOME"):  # wandb's own process would print its log, having no place for it
        with contextlib.suppress(RuntimeError):  # of a user that the system does not know
            os.environ.pop("HOME", None)
            os.environ["HOME"] = str(Path.home())
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True))
    settings = wandb.Settings(silent=True, init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True)
    logger = EnduringWandbLogger(mode=mode, settings=settings, **common)
    logger._wandb_init.pop("anonymous", None)  # Lightning passes it, and wandb warns that it has no effect
    _ = logger.experiment
    return logger


def _forget_server() -> None:
    """Ends what wandb began, also where its own process is dead: a run's id is free again, and the next run is a new one."""
    import wandb
    from wandb.sdk.lib import module

    with contextlib.suppress(Exception):
        wandb.teardown()
    module.unset_globals()


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__


def _kept_id(id_file: str | None) -> str | None:
    if id_file is None:
        return None
    path = Path(id_file)
    kept = path.read_text().strip() if path.exists() else ""
    if not kept:  # a start that was killed here, or had no room on the disk, leaves an empty file
        given = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None  # by a W&B agent
        kept = given or secrets.token_hex(4)
        path.write_text(kept)
    return kept


def finish_wandb(failed: bool) -> None:
    """Ends the W&B run of this job, as failed or not; nothing happens where none was started."""
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    run = wandb.run
    try:
        run.finish(exit_code=int(failed))
    except Exception as error:
        later = f"wandb sync {shlex.quote(str(Path(run.dir).parent))}"
        print(f"W&B could not end its run ({_brief(error)}); upload it later with: {later}", flush=True)
        _forget_server()
