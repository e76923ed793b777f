"""A SLURM job that is asked to make room: two tasks as srun starts them, a ``scontrol`` that notes what it is told."""

import os
import signal
import time

import torch

from tests.jobs import QUICK, begin, free_port


def tasks(tmp_path, *overrides):
    """Starts both tasks of job 4242, which would train for ever."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    scontrol.chmod(0o755)
    common = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    job = (
        "trainer=slurm", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.devices=2", *QUICK[3:], "model=vae",
        "model.encoder.hidden_dim=16", "model.decoder.hidden_dim=16", "logger=csv", "model/lr_scheduler=constant",
        "hydra.run.dir=here", "ckpt=auto", "trainer.max_epochs=1000000", *overrides,
    )  # fmt: skip
    return [begin(*job, cwd=tmp_path, **common, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in range(2)]


def ended(tasks):
    """Waits for both; returns what each has printed, and their codes."""
    done = [task.finish(timeout=60) for task in tasks]
    return [one.stdout + one.stderr for one in done], [one.returncode for one in done]


def wait_for(checkpoint, step=0):
    """Waits until a checkpoint of a later step is there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if checkpoint.exists() and torch.load(checkpoint, weights_only=True)["global_step"] > step:
            return
        time.sleep(0.2)
    raise TimeoutError(checkpoint)


def test_a_job_is_requeued_from_where_it_was_and_stops_where_all_ranks_are(tmp_path):
    """First SIGUSR1 to all tasks, as SLURM sends it; then SIGTERM to the one that writes nothing."""
    checkpoint = tmp_path / "here" / "checkpoints" / "last.ckpt"
    first = tasks(tmp_path)
    wait_for(checkpoint)
    for task in first:
        os.kill(task.pid, signal.SIGUSR1)
    said, codes = ended(first)
    assert codes == [143, 0]
    assert (tmp_path / "told").read_text() == "requeue 4242\n"
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    assert f"SLURM job 4242 is put back in the queue at step {step}\n" in said[0]
    assert "SLURM job" not in said[1]
    assert step % 5 == 0  # where the loss is logged
    again = tasks(tmp_path)
    wait_for(checkpoint, step)
    os.kill(again[1].pid, signal.SIGTERM)
    said, _ = ended(again)
    assert "continuing from" in said[0]
    last = torch.load(checkpoint, weights_only=True)["global_step"]
    assert last > step
    assert f"interrupted at step {last};" in said[0]
    assert (tmp_path / "told").read_text() == "requeue 4242\n"


def test_a_validation_that_is_due_ends_and_is_kept_before_the_job_stops(tmp_path):
    checkpoint = tmp_path / "here" / "checkpoints" / "last.ckpt"
    both = tasks(tmp_path, "trainer.log_every_n_steps=11")  # the ends of epochs
    wait_for(checkpoint)
    for task in both:
        os.kill(task.pid, signal.SIGUSR1)
    said, _ = ended(both)
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    assert step % 11 == 0
    assert f"put back in the queue at step {step}\n" in said[0]
    assert f"interrupted at step {step};" in said[0]
