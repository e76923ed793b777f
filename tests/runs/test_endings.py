"""How runs end before their length, by themselves or by a signal, and how they go on from there."""

import os
import re
import shlex
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks import Pictures
from runs.resuming import resume_command
from runs.testing import end_by_sigterm
from tests.jobs import QUICK, ROOT, SMALL_DDPM, begin, command, configure, result, run_here


def test_early_stopping_and_training_without_averages(tmp_path):
    run_here(
        tmp_path, "model=vae", "logger=csv", "callbacks=early_stopping", "callbacks.early_stopping.patience=1",
        "+callbacks.early_stopping.min_delta=1e6", "~callbacks.ema", "trainer.max_epochs=50",
    )  # fmt: skip
    assert result(tmp_path / "run")["step"] == 22
    assert result(tmp_path / "run")["weights"] == "raw"


@pytest.mark.parametrize(("patience", "steps"), [(0, 22), (1, 22), (2, 33)])
def test_early_stopping_says_that_it_ended_the_run(patience, steps, tmp_path, capsys):
    run_here(
        tmp_path, "model=vae", "logger=csv", "callbacks=early_stopping", f"callbacks.early_stopping.patience={patience}",
        "+callbacks.early_stopping.min_delta=1e6", "trainer.max_epochs=50",
    )  # fmt: skip
    assert result(tmp_path / "run")["step"] == steps
    assert f"stopped early after step {steps}, epoch {steps // 11}: " in capsys.readouterr().out


def test_a_run_says_that_its_time_was_up_and_one_that_ended_as_asked_says_nothing(tmp_path, capsys):
    settings = ("model=vae", "logger=csv", "callbacks.pictures=null", "trainer.check_val_every_n_epoch=1000")
    run_here(tmp_path / "one", *settings, "trainer.max_epochs=-1", "trainer.max_time=00:00:00:01")
    step = result(tmp_path / "one" / "run")["step"]
    assert f"trainer.max_time is up after step {step}, epoch " in capsys.readouterr().out
    run_here(tmp_path / "two", *settings, "trainer.max_time=00:01:00:00")
    assert "after step" not in capsys.readouterr().out


def test_a_run_that_early_stopping_has_ended_is_over_unless_it_is_given_more_patience(tmp_path):
    settings = ("model=vae", "logger=csv", "callbacks=early_stopping", "+callbacks.early_stopping.min_delta=1e6")
    settings += ("callbacks.pictures=null", "trainer.max_epochs=50", "ckpt=auto")
    for patience, steps in ((1, 22), (1, 22), (2, 33), (2, 33)):
        run_here(tmp_path, *settings, f"callbacks.early_stopping.patience={patience}")
        assert result(tmp_path / "run")["step"] == steps


def signalled(number, command_line, tmp_path, beyond=0):
    """Sends a signal once a checkpoint of a later step is there: (exit code, what was printed, the checkpoint's step)."""
    process = begin(*command_line, cwd=tmp_path)
    checkpoint, deadline = tmp_path / "here" / "checkpoints" / "last.ckpt", time.monotonic() + 120

    def step():
        return torch.load(checkpoint, weights_only=True)["global_step"] if checkpoint.exists() else 0

    while step() <= beyond and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, number)
    done = process.finish(timeout=60)
    return done.returncode, done.stdout + done.stderr, step()


def test_a_signal_keeps_the_last_checkpoint_says_how_to_go_on_and_that_works(tmp_path):
    """First Ctrl-C, then SIGTERM, then to the end; with a schedule of one's own."""
    own = tmp_path / "my own" / "model" / "schedule"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("_target_: diffusion.cosine\n_partial_: true\ns: 0.01\n")
    command_line = [
        "--config-dir",
        "my own",
        "model/schedule=mine",
        *QUICK,
        *SMALL_DDPM,
        "logger=csv",
        "callbacks.pictures=null",
        "trainer.max_epochs=100000",
        "hydra.run.dir=here",
        "model/lr_scheduler=constant",
    ]
    step = 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        begun = step
        returned, output, step = signalled(number, command_line, tmp_path, begun)
        assert returned == code
        assert "Traceback" not in output
        assert (f"continuing from {tmp_path}/here/checkpoints/last.ckpt" in output) == (begun > 0)
        (at,) = re.findall(r"interrupted at step (\d+);", output)
        assert int(at) >= step > begun  # more, if it came in a validation
        (said,) = (line for line in output.splitlines() if "ckpt=last" in line)
        command_line = shlex.split(said)[2:]
    command_line[command_line.index("trainer.max_epochs=100000")] = f"trainer.max_epochs={step // 11 + 2}"
    done = command(*command_line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "here")["step"] == (step // 11 + 2) * 11


@pytest.mark.parametrize("name", ["plain (1)", "a b/k=é", "it's", "a\\b"])
def test_the_printed_command_goes_on_wherever_the_run_lies(name, tmp_path):
    configure(tmp_path, "model=vae")
    arguments = shlex.split(resume_command(tmp_path / name))[2:]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", arguments, return_hydra_config=True)
    assert cfg.hydra.run.dir == str(tmp_path / name)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SIGTERMException)])
def test_figures_come_before_pictures_which_a_signal_cuts_short(number, kind, tmp_path, monkeypatch, capsys):
    seen, before = [], signal.getsignal(signal.SIGTERM)

    def draw(self, *_):
        seen.append(result(tmp_path / "run")["metrics"]["test/bpd"])
        signal.raise_signal(number)
        seen.append("went on")

    monkeypatch.setattr(Pictures, "on_test_end", draw)
    with pytest.raises(kind):
        run_here(tmp_path, "model=vae", "logger=csv", "trainer.max_epochs=1")
    output = capsys.readouterr().out
    assert len(seen) == 1
    assert f"{seen[0]:.4f}" in output[: output.index("drawing pictures")]
    assert "interrupted while pictures were drawn; the result stands" in output
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_sigterm_of_the_last_test_batch_draws_no_pictures():
    with pytest.raises(SIGTERMException):
        end_by_sigterm(SimpleNamespace(received_sigterm=True))
