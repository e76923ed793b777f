"""A run directory belongs to one process at a time, however that one ends."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, flag_override

from runs import directory as directories
from runs.build import SettingError
from runs.directory import CONFIG, LAST, LOCK, RESULT, hold, hold_free, write_json
from runs.identity import job_name
from runs.job import run
from runs.sweep import run_in_sweep
from tests.jobs import QUICK, ROOT, configure, result, run_here

HOLDER = """
import sys, time
from pathlib import Path
from runs.directory import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def elsewhere():
    """Calls ``elsewhere(directory)``: another process that holds it by now."""
    begun = []

    def begin(directory):
        begun.append(subprocess.Popen([sys.executable, "-c", HOLDER, directory], cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert begun[-1].stdout.readline() == "held\n"
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


@pytest.fixture
def _at_once(monkeypatch):
    monkeypatch.setattr(directories, "WAIT", 0.0)


@pytest.mark.usefixtures("_at_once")
def test_two_processes_are_never_at_one_run_and_nothing_of_it_is_touched(elsewhere, tmp_path):
    run_here(tmp_path, "model=vae", "logger=csv", "trainer.max_epochs=1")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    elsewhere(tmp_path / "run")
    for again in ("ckpt=last", "ckpt=auto"):
        with pytest.raises(SettingError, match=r"hydra\.run\.dir=.*another process is at"):
            run_here(tmp_path, "model=vae", "logger=csv", again)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_killed_process_holds_nothing_and_one_that_ends_soon_is_waited_for(elsewhere, tmp_path):
    process = elsewhere(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    with hold(tmp_path), hold(tmp_path):  # a job of a sweep asks twice
        pass
    elsewhere(tmp_path)


def test_a_refused_job_leaves_no_directory_and_nothing_is_lost_that_was_there(tmp_path):
    for there in (False, True):
        if there:
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "notes.txt").write_text("mine")
        with pytest.raises(SettingError, match="is larger than"):
            run_here(tmp_path, "model=vae", "data.batch_size=100000")
        assert (tmp_path / "run").exists() == there
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.usefixtures("_at_once")
@pytest.mark.parametrize("fresh", [False, True])
def test_a_sweep_leaves_a_job_to_the_process_that_runs_it(fresh, elsewhere, tmp_path, capsys):
    cfg = configure(tmp_path, "model=vae", f"sweep.fresh={fresh}")
    job = tmp_path / "run" / job_name(cfg, ())
    job.mkdir()
    (job / "job.json").write_text("as it was")
    process, ran = elsewhere(job), []
    assert run_in_sweep(cfg, ran.append) is None
    assert capsys.readouterr().out == f"job {job.name} is left to the process that runs it\n"
    assert not ran
    assert [path.name for path in (tmp_path / "run").iterdir()] == [job.name]
    assert (job / "job.json").read_text() == "as it was"
    process.kill()
    process.wait()
    run_in_sweep(cfg, ran.append)
    assert len(ran) == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [job.name, f"{job.name}-before-1"][: 1 + fresh]


def test_nothing_of_a_run_is_overwritten_whatever_has_been_taken_from_it(tmp_path):
    def all_files():
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != LOCK}

    settings, run = ("model=vae", "logger=csv", "trainer.max_epochs=1"), tmp_path / "run"
    run_here(tmp_path, *settings)
    (run / CONFIG).unlink()
    before = all_files()
    with pytest.raises(SettingError, match="already holds a run: add ckpt=auto"):
        run_here(tmp_path, *settings, "seed=5")
    assert all_files() == before
    (run / LAST).unlink()
    run_here(tmp_path, *settings, "trainer.max_epochs=2", "ckpt=auto")  # from the best, as none is later
    assert result(run)["step"] == 22
    shutil.rmtree(run / "checkpoints")
    before = all_files()
    with pytest.raises(SettingError, match="already holds a run without a checkpoint to go on from"):
        run_here(tmp_path, *settings, "seed=5", "ckpt=auto")
    assert all_files() == before
    (run / RESULT).unlink()  # as a run that was killed before its first validation
    run_here(tmp_path, *settings, "ckpt=auto")
    assert result(run)["step"] == 11


def test_of_runs_with_one_name_each_has_a_directory_of_its_own(elsewhere, tmp_path):
    elsewhere(tmp_path)
    with hold_free(tmp_path) as second:
        (second / "config.yaml").touch()
    with hold_free(tmp_path) as third:
        assert (second, third) == (Path(f"{tmp_path}-2"), Path(f"{tmp_path}-3"))


def test_a_run_whose_directory_is_named_by_the_second_takes_the_next_free_name(tmp_path):
    cfg = configure(tmp_path, *QUICK, "model=vae", "logger=csv", "trainer.max_epochs=1")
    hydra = HydraConfig.get()
    directory = Path(hydra.run.dir).absolute()
    with flag_override(hydra, ["readonly", "struct"], False):
        hydra.runtime.output_dir = str(directory)
    directory.mkdir(parents=True)
    (directory / RESULT).write_text("{}")
    run(cfg)
    assert hydra.run.dir == f"{directory}-2"
    assert sorted(directory.parent.glob(f"*/{RESULT}")) == [directory / RESULT, Path(f"{directory}-2") / RESULT]
    assert (directory / RESULT).read_text() == "{}"


@pytest.mark.parametrize("text", ["precious: 1\n", "model: {\n", "- a\n"])
def test_a_config_that_no_run_wrote_is_left_alone(text, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIG).write_text(text)
    for again in ((), ("ckpt=auto",)):
        with pytest.raises(SettingError, match=r"has a config\.yaml that no run wrote"):
            run_here(tmp_path, "model=vae", "logger=csv", "trainer.max_epochs=1", *again)
    assert (tmp_path / "run" / CONFIG).read_text() == text


def test_what_is_not_finite_becomes_null(tmp_path):
    write_json(tmp_path / "a.json", {"x": [math.inf, -math.inf, math.nan, 1.5], "y": {"z": (math.inf,)}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, None, None, 1.5], "y": {"z": [None]}}


def test_a_disk_that_is_full_when_the_config_is_written_keeps_nobody_from_beginning_again(tmp_path, monkeypatch):
    def half(config, path):
        Path(path).write_text("model:")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    settings = ("model=vae", "logger=csv", "trainer.max_epochs=1", "callbacks.pictures=null")
    with monkeypatch.context() as full:
        full.setattr(OmegaConf, "save", half)
        with pytest.raises(OSError, match="No space left") as met:
            run_here(tmp_path, *settings)
    assert met.value.filename == str(tmp_path / "run" / CONFIG)
    run_here(tmp_path, *settings, "ckpt=auto")
    assert result(tmp_path / "run")["step"] == 11
