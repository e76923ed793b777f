"""One job of a sweep: found again by its identity, skipped when done, continued when interrupted."""

from __future__ import annotations

import json
import os
import platform
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, flag_override, open_dict

from runs.commands import as_written
from runs.directory import BEST, LAST, RESULT, HeldElsewhere, first_free, hold, is_held, write_json
from runs.faults import is_fault
from runs.identity import job_name
from runs.relaunch import one_job
from runs.search import is_search

STATE, SWEEP = "job.json", "multirun.yaml"
ENTRY = Path(__file__).resolve().parents[1] / "train.py"
SWITCHES = ("sweep.fresh", "sweep.retry_failed")
BEFORE = "-before-"  # in the name of what a job left before sweep.fresh=true ran it again


def wrong_switch(cfg: DictConfig) -> str | None:
    """Returns a sentence for a switch of a sweep that is neither true nor false; ``None`` if there is none."""
    if not isinstance(cfg.get("sweep"), DictConfig):
        return f"sweep={cfg.get('sweep')}: leave it alone, or set {' or '.join(SWITCHES)}"
    for name in SWITCHES:
        value = OmegaConf.select(cfg, name)
        if value is not None and not isinstance(value, bool):
            return f"{name}={value}: give true or false"
    return None


def read_state(directory: Path) -> tuple[str, str]:
    """Returns (state, reason): done, failed, ended, interrupted (there is a checkpoint), started (there is none) or new.

    One that is not done and that another process holds is running elsewhere. A job has ended without a result where a callback
    did what it was for, as the search for a batch size.
    """
    if _read(directory / RESULT):
        return "done", ""
    if is_held(directory):
        return "running elsewhere", ""
    written = _read(directory / STATE)
    if written.get("status") in ("failed", "ended"):
        return written["status"], str(written.get("reason", ""))
    if any((directory / name).is_file() for name in (LAST, BEST)):
        return "interrupted", ""
    return ("started" if directory.is_dir() else "new"), ""


def _read(path: Path) -> dict[str, Any]:
    """Returns what a file holds; nothing if it is not there, or damaged: then the job is not done."""
    try:
        written = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return written if isinstance(written, dict) else {}


def write_state(directory: Path, status: str, overrides: Sequence[str], reason: str = "") -> None:
    """Writes job.json at once, so that a killed job leaves a whole one."""
    record = {"status": status, "reason": reason, "overrides": list(overrides), "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    if status == "running":
        record |= {"process": os.getpid(), "begun_by": _named(os.getppid())}
    write_json(directory / STATE, record)


def _named(process: int) -> str:
    """Names a process apart from those of other machines, which may share the directory and the number."""
    return f"{process} on {platform.node()}"


def ask_to_stop(directory: Path) -> bool:
    """Asks for the end of a job that a worker of this process trains; returns whether there was one to ask."""
    job = _read(directory / STATE)
    if job.get("status") == "running" and job.get("begun_by") == _named(os.getpid()) and is_held(directory):
        with suppress(ProcessLookupError):
            os.kill(job["process"], signal.SIGTERM)
            return True
    return False


def run_or_leave(cfg: DictConfig, run: Callable[[DictConfig], float], sweep: Path) -> float | None:
    """Does what :func:`runs.sweep.run_in_sweep` says, in the process that is to train."""
    # a sweeper that leaves no record of what its jobs share names them by their identity alone
    own = varied(HydraConfig.get().overrides.task, sweep) if (sweep / SWEEP).is_file() else ()
    directory = sweep / job_name(cfg, own)
    try:
        # a search has done that for all of them: it may ask for one twice
        if cfg.sweep.fresh is True and directory.exists() and not is_search(HydraConfig.get().sweeper):
            with hold(directory):
                move_aside(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with hold(directory):
            return _run_held(cfg, run, sweep, directory)
    except HeldElsewhere:
        print(f"job {directory.name} is left to the process that runs it", flush=True)
        return None


def _run_held(cfg: DictConfig, run: Callable[[DictConfig], float], sweep: Path, directory: Path) -> float | None:
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    state, _ = read_state(directory)
    if state == "done":
        return _read(directory / RESULT).get("objective")
    if state == "failed" and not cfg.sweep.retry_failed:
        return None
    write_state(directory, "running", overrides)
    with flag_override(hydra, ["readonly", "struct"], False):
        hydra.runtime.output_dir = str(directory)
    # its own checkpoint comes before one that it began from, also the best, where it was killed before its first last.ckpt;
    # auto: one that ended before any begins anew where it is
    own = "last" if (directory / LAST).is_file() else "auto" if not cfg.ckpt or (directory / BEST).is_file() else None
    with open_dict(cfg):
        cfg.ckpt = own or cfg.ckpt
        _name_in_wandb(cfg, sweep, directory, overrides)
    share_threads()
    try:
        with one_job(ENTRY, directory, (f"ckpt={own}",) if own else ()):
            objective = run(cfg)
    except (KeyboardInterrupt, SystemExit) as stop:
        if type(stop) is SystemExit:  # a callback's; SIGTERM makes another in Lightning, which ends with code 0
            if stop.code:
                raise
            write_state(directory, "ended", overrides)
            return None
        write_state(directory, "interrupted", overrides)
        raise KeyboardInterrupt from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        (directory / "error.txt").write_text(traceback.format_exc(), encoding="utf-8", errors="backslashreplace")
        kind = f"{type(error).__name__}: " if is_fault(error) else ""  # a refusal is a sentence as it is
        write_state(directory, "failed", overrides, f"{kind}{reason}"[:500])
        print(f"job {directory.name} failed: {reason[:300]} (see {directory / 'error.txt'})", flush=True)
        return None
    write_state(directory, "done", overrides)
    return objective


def share_threads() -> None:
    """Divides this machine's threads among the jobs that joblib runs at once."""
    at_once = HydraConfig.get().launcher.get("n_jobs")
    if at_once is None:
        return
    import torch

    cores = os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // (cores if at_once < 0 else at_once)))


def varied(overrides: Sequence[str], sweep: Path) -> list[str]:
    """Returns the overrides of a job that other jobs of the sweep do not share."""
    try:
        common = as_written(OmegaConf.load(sweep / SWEEP))
    except (OSError, AttributeError):
        return list(overrides)
    return not_shared(overrides, common)


def not_shared(overrides: Sequence[str], common: Sequence[str]) -> list[str]:
    """Returns the overrides of a job whose keys a sweep gives several values, by keys: Hydra writes false as False in a job."""
    parse = OverridesParser.create().parse_overrides
    shared = {one.get_key_element() for one in parse(list(common)) if not one.is_sweep_override() or _has_one_value(one)}
    own = zip(overrides, parse(list(overrides)), strict=True)
    return [item for item, one in own if one.get_key_element() not in shared]


def _has_one_value(override: Override) -> bool:
    return override.is_choice_sweep() and len(override.value().list) == 1


def _name_in_wandb(cfg: DictConfig, sweep: Path, directory: Path, overrides: Sequence[str]) -> None:
    """One W&B group for the sweep, one run for the job, tagged by what varies."""
    if not cfg.get("logger") or "group" not in cfg.logger:
        return
    given = {item.lstrip("+").split("=")[0] for item in overrides}
    tags = [item[-64:] for item in varied(overrides, sweep)]  # W&B takes 64 characters
    named = {"logger.group": sweep.name, "logger.name": directory.name, "logger.tags": tags}
    for key, value in named.items():
        if key not in given:
            OmegaConf.update(cfg, key, value)


def move_aside(path: Path) -> None:
    """Keeps what is there under another name."""

    def kept(number: int) -> Path:
        return path.with_name(f"{path.name}{BEFORE}{number}")

    path.rename(kept(first_free(lambda number: kept(number).exists())))
