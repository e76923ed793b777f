"""Sweeps: one directory, jobs found again, failures that stop nobody, ranks that run their parent's job."""

import json
import os
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from runs.build import SettingError
from runs.directory import is_held
from runs.identity import job_name
from runs.sweep import run_in_sweep
from runs.sweep_jobs import read_state
from tests.jobs import QUICK, begin, command, configure, result, run_here
from tests.runs.cluster import make_cluster
from tests.runs.ranks import assert_ranks_agree
from tests.runs.sweeps import JOB, LONG, RANKS, checkpoints, start, sweeps, wandb_files
from tests.wandb_file import read, records


def write_pictures(folder, num, brightest):
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, brightest, (num, 8, 8, 3), dtype=np.uint8, endpoint=True)
    for index, image in enumerate(noise):
        Image.fromarray(image).save(folder / f"{index}.png")


def figures(directory):
    """{seed: (val objective, test bits/dim)} of the only sweep."""
    (sweep,) = sweeps(directory)
    found = {}
    for path in sweep.glob("*/result.json"):
        record = result(path.parent)
        found[record["seed"]] = record["objective"], record["metrics"]["test/bpd"]
    return found


def test_jobs_are_run_once_failures_stop_nobody_and_all_is_said(tmp_path):
    overrides = ["-m", *JOB, "trainer.gradient_clip_val=null", "seed=0,1", "model.optimizer.lr=0.001,1e+30,-1"]
    first = command(*overrides, cwd=tmp_path)
    assert first.returncode == 1
    assert "Traceback" not in first.stderr + first.stdout
    (sweep,) = sweeps(tmp_path)
    states = {path.parent: json.loads(path.read_text()) for path in sweep.glob("*/job.json")}
    assert sorted(state["status"] for state in states.values()) == ["done", "done", *["failed"] * 4]
    reasons = [state["reason"] for state in states.values() if state["status"] == "failed"]
    assert [sum(word in reason for reason in reasons) for word in ("training diverged", "model.optimizer.lr=-1")] == [2, 2]
    assert not any("Error: " in reason for reason in reasons)  # sentences as they are, none of them a fault of code
    assert "2 of 6 jobs done" in first.stdout
    # one W&B run for each job that got so far, in one group, tagged by what varies
    runs = [next(r.run for r in records(path) if r.WhichOneof("record_type") == "run") for path in wandb_files(tmp_path)]
    assert {run.run_group for run in runs} == {sweep.name}
    tags = sorted(tuple(sorted(run.tags)) for run in runs)
    assert tags == sorted((f"model.optimizer.lr={rate}", f"seed={seed}") for rate in ("0.001", "1e+30") for seed in (0, 1))

    times = {path: path.stat().st_mtime_ns for path in sweep.glob("*/result.json")}
    again = command(*overrides, "sweep.retry_failed=false", cwd=tmp_path)
    assert again.returncode == 1
    assert sweeps(tmp_path) == [sweep]
    assert again.stdout.count("skipped") == 2
    assert again.stdout.count("left alone") == 4
    assert {path: path.stat().st_mtime_ns for path in sweep.glob("*/result.json")} == times

    one = next(iter(times)).parent
    shutil.copy(one / "result.json", tmp_path / "taken")
    (one / "result.json").write_text("{")  # by a disk that was full
    here = [*overrides, f"hydra.sweep.dir={sweep}", "logger=csv"]  # where runs go on is no part of which they are
    third = command(*here, cwd=tmp_path)
    assert third.stdout.count("continued") == 1
    assert third.stdout.count("tried again") == 4
    assert f"continuing from {one}" in third.stdout
    assert third.stdout.count("training diverged") == 4  # begun anew, as nothing was kept; and said again at the end
    assert "already holds a run" not in third.stdout
    assert result(one)["metrics"]["test/bpd"] == json.loads((tmp_path / "taken").read_text())["metrics"]["test/bpd"]

    misspelt = command(*here, "sweep.fresh=flase", cwd=tmp_path)
    assert misspelt.stderr == "error: sweep.fresh=flase: give true or false\n"
    assert not list(sweep.glob("*-before-*"))
    command(*[item.replace("0.001,1e+30,-1", "0.001") for item in here], "sweep.fresh=true", cwd=tmp_path)
    assert len(list(sweep.glob("*-before-1/result.json"))) == 2


def test_a_killed_sweep_goes_on_where_it_was(tmp_path):
    overrides = ["-m", *LONG, "seed=0,1"]
    killed = start(overrides, tmp_path)
    killed.kill()
    assert killed.finish(timeout=60).returncode == -signal.SIGKILL
    (directory,) = (path.parents[1] for path in checkpoints(tmp_path))
    assert not (directory / "result.json").exists()
    done = command(*overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stdout
    assert {result(path.parent)["step"] for path in tmp_path.glob("outputs/sweeps/*/*/result.json")} == {165}


def test_ctrl_c_ends_a_sweep_with_its_summary_and_the_same_command_goes_on(tmp_path):
    overrides = ["-m", *LONG, "seed=0,1", "logger=wandb", "logger.mode=offline"]
    process = start(overrides, tmp_path)
    os.kill(process.pid, signal.SIGINT)
    done = process.finish(timeout=60)
    output = done.stdout + done.stderr
    assert done.returncode == 130, output
    assert "Traceback" not in output
    (directory,) = (path.parents[1] for path in checkpoints(tmp_path))
    assert "sweep: 0 of 2 jobs done, 1 interrupted, 1 not started in" in output
    assert f"interrupted: {directory.name}" in output
    assert "the same command goes on" in output
    assert json.loads((directory / "job.json").read_text())["status"] == "interrupted"
    assert read(tmp_path / "outputs" / "wandb")["exit"][-1].exit_code == 1
    step = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    (at,) = re.findall(r"interrupted at step (\d+);", output)
    assert int(at) >= step  # more, if it came in a validation
    done = command(*overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sweep: 2 of 2 jobs done in" in done.stdout
    assert f"continuing from {directory}/checkpoints/last.ckpt" in done.stdout
    assert {result(path.parent)["step"] for path in tmp_path.glob("outputs/sweeps/*/*/result.json")} == {165}


def test_jobs_over_cores_end_with_their_sweep_and_leave_checkpoints_however_it_ends(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    overrides = ["-m", *LONG, "trainer.max_epochs=100000", "seed=0,1,2", "hydra/launcher=cores", "hydra.launcher.n_jobs=2"]
    process = start(overrides, tmp_path, number=2)
    jobs = [path.parents[1] for path in checkpoints(tmp_path)]
    assert {read_state(job) for job in jobs} == {("running elsewhere", "")}
    os.kill(process.pid, signal.SIGTERM)
    done = process.finish(timeout=60)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "sweep: 0 of 3 jobs done, 2 interrupted, 1 not started in" in done.stdout
    assert "the same command goes on" in done.stdout
    assert done.stdout.count("interrupted at step") == 2
    kept = assert_interrupted(jobs)

    written = [path.stat().st_mtime_ns for path in checkpoints(tmp_path)]
    killed = begin(*overrides, cwd=tmp_path)
    await_that(lambda: all(path.stat().st_mtime_ns not in written for path in checkpoints(tmp_path)))
    os.kill(killed.pid, signal.SIGKILL)  # the sweep's process alone
    await_that(lambda: not any(is_held(job) for job in jobs))
    killed.finish(timeout=60)
    assert all(np.greater(assert_interrupted(jobs), kept))


def await_that(holds):
    deadline = time.monotonic() + 120
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert holds()


def assert_interrupted(jobs):
    """Holds jobs to have stopped by themselves; returns the steps of their checkpoints."""
    assert [json.loads((job / "job.json").read_text())["status"] for job in jobs] == ["interrupted"] * len(jobs)
    return [torch.load(job / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] for job in jobs]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The figures of one rank: {seed: (val objective, test bits/dim)}."""
    directory, found = tmp_path_factory.mktemp("alone"), {}
    for seed in (0, 1):
        run_here(directory / str(seed), *JOB, "logger=csv", f"seed={seed}")
        record = result(directory / str(seed) / "run")
        found[seed] = record["objective"], record["metrics"]["test/bpd"]
    return found


LAUNCHERS = {  # with its jobs' seeds
    "basic": ((), [0, 1]),
    "joblib": (("hydra/launcher=cores", "hydra.launcher.n_jobs=2"), [1]),
    "submitit_local": (("hydra/launcher=submitit_local",), [1]),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_in_a_sweep_are_one_job_each_under_every_launcher(launcher, alone, tmp_path):
    if launcher != "basic":
        pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    settings, seeds = LAUNCHERS[launcher]
    done = command("-m", *settings, *RANKS, "trainer.devices=2", f"seed={','.join(map(str, seeds))}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(sweeps(tmp_path)) == 1
    assert not (tmp_path / "multirun").exists()
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {"sweeps", "wandb"}
    assert len(wandb_files(tmp_path)) == len(seeds)
    for path in sweeps(tmp_path)[0].glob("*/result.json"):
        assert_ranks_agree(path.parent)
    found = figures(tmp_path)
    assert sorted(found) == seeds
    for seed, pair in found.items():
        assert pair == pytest.approx(alone[seed], abs=1e-4)


def test_a_worker_that_the_system_ends_is_told_in_a_sentence_after_the_summary(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    killed = ("+callbacks.killed._target_=tests.probes.Signals", "+callbacks.killed.number=9", "+callbacks.killed.step=5")
    done = command(
        "-m", "model=vae", *QUICK, *killed, "logger=csv", "seed=0,1,2", "hydra/launcher=cores", "hydra.launcher.n_jobs=2",
        "trainer.max_epochs=1", "callbacks.pictures=null", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(r"sweep: 0 of 3 jobs done, .*not started", done.stdout), done.stdout
    assert "error: the system has ended a worker of this sweep" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_devices_may_vary_within_a_sweep(alone, tmp_path):
    done = command("-m", *RANKS, "logger=csv", "trainer.devices=2,1,2", "seed=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (sweep,) = sweeps(tmp_path)
    found = {result(path.parent)["devices"]: result(path.parent) for path in sweep.glob("*/result.json")}
    assert found.keys() == {1, 2}
    for record in found.values():
        assert (record["objective"], record["metrics"]["test/bpd"]) == pytest.approx(alone[0], abs=1e-4)


def test_jobs_of_two_ranks_go_to_a_slurm_cluster_and_come_back(alone, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    cluster = make_cluster(tmp_path / "cluster")
    done = command(
        "-m", "hydra/launcher=slurm", "hydra.launcher.partition=small", *RANKS, "trainer.devices=2", "seed=0,1", "logger=csv",
        cwd=tmp_path,
        PATH=f"{cluster}:{os.environ['PATH']}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "sweep: 2 of 2 jobs done" in done.stdout
    assert {path.stem for path in cluster.glob("*.begun")} == {"4711_0", "4711_1"}
    (sweep,) = sweeps(tmp_path)
    asked = {line for path in sweep.rglob("*submission*.sh") for line in path.read_text().splitlines()}
    assert {"#SBATCH --partition=small", "#SBATCH --time=240", "#SBATCH --gpus-per-node=1"} <= asked
    assert any(line.startswith("#SBATCH --array=0-1") for line in asked)
    for path in sweep.glob("*/result.json"):
        assert_ranks_agree(path.parent)
    found = figures(tmp_path)
    assert found.keys() == alone.keys()
    for seed, pair in found.items():
        assert pair == pytest.approx(alone[seed], abs=1e-4)


def test_a_combination_that_makes_no_config_stops_no_other(tmp_path):
    overrides = ["-m", *JOB, "logger=csv", "model=vae,ddpm", "model/schedule=cosine", "trainer.max_epochs=1"]
    overrides.remove("model=ddpm")
    with_joblib = ["hydra/launcher=cores", "hydra.launcher.n_jobs=2"]
    for launcher in ([], with_joblib):
        done = command(*overrides, *launcher, cwd=tmp_path)
        assert done.returncode == 1, done.stderr
        assert "cannot be composed" in done.stdout
        assert "1 of 2 jobs done, 1 failed" in done.stdout
        assert "model/schedule" in done.stdout.split("failed: refused-")[1]
    (sweep,) = sweeps(tmp_path)
    command(*overrides, "sweep.retry_failed=false", cwd=tmp_path)  # a switch makes no other combination of it
    (place,) = sweep.glob("refused-*")
    assert json.loads((place / "job.json").read_text())["status"] == "failed"
    assert [path.parent.name.split("-")[0] for path in sweep.glob("*/result.json")] == ["ddpm"]


def test_a_sweep_of_the_config_is_planned_as_one_of_the_command_line(tmp_path):
    # the latter is a setting of both, and not of the model that a sweep's own config has
    settings = ("model=vae,mhvae", *QUICK, "trainer.max_epochs=1", "callbacks.pictures=null", "logger=csv", "model.beta=0.5")
    done = command("hydra.mode=MULTIRUN", *settings, 'hydra.sweeper.params={model/posterior:"markov"}', cwd=tmp_path)
    assert done.returncode == 1
    assert "left out: it cannot be composed" in done.stdout
    assert "sweep: 1 of 2 jobs done, 1 failed" in done.stdout


def test_a_job_that_goes_on_from_elsewhere_goes_on_from_its_own_checkpoint_once_it_has_one(tmp_path):
    cfg = configure(tmp_path, "model=vae", "ckpt=elsewhere.ckpt")
    job = tmp_path / "run" / job_name(cfg, ())
    seen = []
    assert run_in_sweep(cfg, lambda cfg: seen.append(cfg.ckpt)) is None
    (job / "checkpoints").mkdir()
    for name in ("best", "last"):  # killed between the two, it has the first alone
        (job / "checkpoints" / f"{name}.ckpt").touch()
        cfg = configure(tmp_path, "model=vae", "ckpt=elsewhere.ckpt")
        run_in_sweep(cfg, lambda cfg: seen.append(cfg.ckpt))
    assert seen == ["elsewhere.ckpt", "auto", "last"]


@pytest.mark.parametrize(("names", "own"), [((), "auto"), (("best",), "auto"), (("best", "last"), "last")])
def test_all_ranks_of_a_job_go_on_from_the_checkpoint_that_the_first_does(names, own, tmp_path):
    cfg = configure(tmp_path, "model=vae")
    checkpoints = tmp_path / "run" / job_name(cfg, ()) / "checkpoints"
    checkpoints.mkdir(parents=True)
    for name in names:
        (checkpoints / f"{name}.ckpt").touch()
    seen = []
    run_in_sweep(cfg, lambda cfg: seen.append((cfg.ckpt, sys.argv[-1])))
    assert seen == [(own, f"ckpt={own}")]


def test_a_fault_of_code_is_recorded_with_its_class_and_a_refusal_as_its_sentence(tmp_path):
    def refuse(cfg):
        raise SettingError("model.depth=0: give at least 1")

    for run, reason in ((refuse, "model.depth=0: give at least 1"), (lambda cfg: {}["posterior"], "KeyError: 'posterior'")):
        cfg = configure(tmp_path, "model=vae")
        assert run_in_sweep(cfg, run) is None
        assert read_state(tmp_path / "run" / job_name(cfg, ())) == ("failed", reason)


def test_a_sweep_over_data_sets_in_several_folders_runs_each(tmp_path):
    for number, name in enumerate("ab"):
        write_pictures(tmp_path / name, 30, brightest=255 >> 3 * number)
    done = command(
        "-m", "model=vae", "data=image_folder", "data.root=a,b", "data.image_size=8", "data.batch_size=8", "logger=csv",
        "trainer.accelerator=cpu", "trainer.devices=1", "trainer.max_epochs=1", "callbacks.pictures=null", cwd=tmp_path,
    )  # fmt: skip
    assert "sweep: 2 of 2 jobs done" in done.stdout, done.stdout + done.stderr
    (sweep,) = sweeps(tmp_path)
    records = [result(path.parent) for path in sweep.glob("*/result.json")]
    assert {record["protocol"]["folder"] for record in records} == {"a", "b"}
    assert len({record["protocol"]["files_sha256"] for record in records}) == 2  # of the same names, but not the same files


def test_a_job_that_a_callback_ends_ends_no_sweep(tmp_path):
    settings = ("model=vae,mhvae", "trainer.accelerator=cpu", "trainer.devices=1", "callbacks=batch_size_finder", "logger=csv")
    done = command("-m", *settings, "callbacks.batch_size_finder.most=2", cwd=tmp_path)
    assert done.stdout.count("data.batch_size=2 fits") == 2
    assert "sweep: 0 of 2 jobs done, 2 ended" in done.stdout
    assert done.returncode == 0, done.stderr
