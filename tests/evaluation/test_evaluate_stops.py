"""What an evaluation refuses, and what Ctrl-C leaves of one."""

import json
import math
import os
import runpy
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch

import evaluation.extras
from evaluation.flow import ProbabilityFlow
from lightning_modules import VAELightningModule
from networks import MLPDenoiser
from runs.build import SettingError
from runs.entry import told
from tests.evaluation.evaluations import CPU, QUICK, evaluate_here, record, refuse_constant
from tests.jobs import ROOT, begin


def test_weights_that_are_not_finite_and_places_that_take_no_results_are_refused_first(runs, tmp_path, monkeypatch):
    run = runs.copy("vae", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        with pytest.raises(SettingError, match="nothing can be written"):
            evaluate_here(run, *QUICK)
    checkpoint = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    next(iter(checkpoint["state_dict"].values())).fill_(math.nan)
    torch.save(checkpoint, run / "checkpoints/best.ckpt")
    with pytest.raises(SettingError, match="ema weights that are not finite"):
        evaluate_here(run, *QUICK)
    with pytest.raises(SettingError, match="packages=3: give names"):
        evaluate_here(run, "weights=raw", "packages=3", *QUICK)
    for packages in ("null", "mine"):
        evaluate_here(run, "weights=raw", "replicates=1", "max_images=4", f"packages={packages}", *QUICK)


def test_an_estimate_that_is_not_finite_is_no_figure(runs, tmp_path, monkeypatch):
    run, usual = runs.copy("vae", tmp_path), VAELightningModule.elbo

    def elbo(self, x):
        found = usual(self, x)
        return replace(found, reconstruction=found.reconstruction.index_fill(0, torch.tensor([0]), math.nan))

    monkeypatch.setattr(VAELightningModule, "elbo", elbo)
    with pytest.raises(SettingError, match="the bound is nan: 1 of 180 images have no finite estimate"):
        evaluate_here(run, "replicates=1", "batch_size=180", *QUICK)
    assert not (run / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("name", "overrides", "sentence"),
    [
        ("vae", ["split=nope"], "split=nope"),
        ("vae", ["precision=0"], "precision=0"),
        ("vae", ["balance=abc"], "balance=abc"),
        ("vae", ["fabric.num_nodes=2"], "fabric.num_nodes=2"),
        ("ddpm", ["evaluation=stratified", "evaluation.calls=null"], "evaluation.calls"),
        ("vae", ["precision=-1"], "precision=-1"),
        ("vae", ["precision=nan"], "precision=nan"),
        ("vae", ["precision=high"], "precision=high"),
        ("vae", ["precision=null"], "precision"),
        ("vae", ["weights=nope"], "weights=nope"),
        ("vae", ["evaluation=full"], "evaluation=full"),
        ("vae", ["evaluation=importance"], "evaluation=importance"),
        ("mhvae", ["evaluation=three_variable"], "evaluation=three_variable"),
        ("vae", ["iwae_samples=-1"], "iwae_samples=-1"),
        ("vae", ["iwae_samples=2.5"], "iwae_samples=2.5"),
        ("vae", ["replicates=0"], "replicates=0"),
        ("vae", ["max_images=1"], "max_images=1"),
        ("vae", ["batch_size=0"], "batch_size=0"),
        ("vae", ["seed=-1"], "seed=-1"),
        ("vae", ["probability_flow=1"], "probability_flow=1"),
        ("ddpm", ["evaluation=stratified", "evaluation.calls=1"], "evaluation.calls=1"),
        ("ddpm", ["evaluation=importance", "evaluation.calls=2.5"], "evaluation.calls=2.5"),
        ("vae", ["weights=0"], "weights=0"),
        ("vae", ["iwae_samples=100000000000"], "iwae_samples=100000000000: give an integer of at least 0 and at most 1000000"),
        ("vae", ["replicates=100000000000"], "replicates=100000000000"),
        ("ddpm", ["probability_flow=100000000000"], "probability_flow=100000000000"),
        ("ddpm", ["flow_tolerance=0"], "flow_tolerance=0: give a number from 1e-08 to 1"),
        ("vae", ["fabric.accelerator=[1,2]"], "fabric.accelerator=[1, 2]: give a word"),
        ("vae", ["fabric.devices=100000000000"], "fabric.devices=100000000000: give the number of devices of one machine"),
        ("vae", ["fabric.accelerator=cpu", "fabric.devices=[0]"], "fabric cannot be built with accelerator=cpu, devices=[0], "),
        ("vae", ["fabric.precision=half"], "precision"),
        ("vae", ["fabric.precision=bf16-true"], "bf16-mixed"),
        ("vae", ["fabric.accelerator=tpu"], "fabric"),
        ("vae", ["fabric.float32_matmul_precision=tf32"], "fabric.float32_matmul_precision=tf32: choose highest"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_sentence_before_any_work(name, overrides, sentence, runs, capsys):
    run = runs[name]
    capsys.readouterr()
    with pytest.raises(SettingError) as error:
        evaluate_here(run, "replicates=2", "max_images=8", *QUICK, *overrides)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert told(error.value) == f"error: {error.value}"  # without a traceback
    assert "total" not in capsys.readouterr().out
    assert not (run / "evaluation.json").exists()


def test_a_missing_run_is_refused(tmp_path):
    for run in ("???", tmp_path / "nowhere"):
        with pytest.raises(SettingError, match="give a run directory") as error:
            evaluate_here(run)
        assert "\n" not in str(error.value)


def evaluate_interrupted(run, *overrides):
    try:
        return evaluate_here(run, *overrides)
    except KeyboardInterrupt:
        pytest.fail("Ctrl-C came through, as a traceback, and what was finished is lost")


def stop_after(calls, monkeypatch, owner, name):
    """Makes a function raise what Ctrl-C raises, at its call number ``calls`` + 1."""
    real, count = getattr(owner, name), [0]

    def wrapped(*args, **kwargs):
        count[0] += 1
        if count[0] == calls + 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(("calls", "images", "replicates"), [(3, 45, 2), (4, 60, 2), (7, 60, 2), (8, 60, 4), (9, 60, 4)])
def test_an_interrupted_evaluation_is_that_of_what_is_finished(calls, images, replicates, runs, tmp_path, monkeypatch, capsys):
    """Of all images as soon as each has two estimates, and of as many estimates as each of them has."""
    run = runs.copy("vae", tmp_path)
    settings = ("batch_size=30", "weights=both")
    expected, _ = evaluate_here(run, *settings, f"replicates={replicates}", f"max_images={images}", *QUICK)
    own = record(run)["results"]["ema"]
    with monkeypatch.context() as patch:
        stop_after(calls, patch, VAELightningModule, "elbo")
        figure, interrupted = evaluate_here(run, *settings, "replicates=5", "max_images=60")
    assert interrupted
    kept = record(run)
    assert kept["interrupted"] is True
    assert list(kept["results"]) == ["ema"]
    found = kept["results"]["ema"]
    assert [found[key] for key in ("num_images", "replicates", "network_calls_per_image")] == [images, replicates, replicates]
    assert figure == pytest.approx(expected, rel=1e-9)
    assert kept["bpd_se"] == pytest.approx(own["bpd_se"], rel=5e-3)  # other images shared their groups
    assert f"interrupted: {images} images" in " ".join(capsys.readouterr().out.split())


def test_nothing_is_reported_where_nothing_was_finished(runs, tmp_path, monkeypatch):
    run = runs.copy("vae", tmp_path)
    stop_after(0, monkeypatch, VAELightningModule, "elbo")
    with pytest.raises(SettingError, match="interrupted before two images were finished"):
        evaluate_here(run, "replicates=3")


def test_an_interrupt_does_not_hide_images_that_have_no_finite_estimate(runs, tmp_path, monkeypatch):
    run, usual, calls = runs.copy("vae", tmp_path), VAELightningModule.elbo, []

    def elbo(self, x):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        found = usual(self, x)
        return replace(found, reconstruction=found.reconstruction.index_fill(0, torch.tensor([0]), math.nan))

    monkeypatch.setattr(VAELightningModule, "elbo", elbo)
    with pytest.raises(SettingError, match="3 of 90 images have no finite estimate"):
        evaluate_here(run, "replicates=1", "batch_size=30", *QUICK)


@pytest.mark.parametrize(
    ("name", "owner", "function", "asked"),
    [
        ("vae", VAELightningModule, "log_weight", "iwae_samples=2"),
        ("vae", evaluation.extras, "measure_latents", "balance=true"),
        ("ddpm", ProbabilityFlow, "log_likelihood", "probability_flow=1"),
    ],
)
def test_ctrl_c_in_what_follows_the_bound_keeps_the_bound(name, owner, function, asked, runs, tmp_path, monkeypatch):
    run = runs.copy(name, tmp_path)
    stop_after(0, monkeypatch, owner, function)
    figure, interrupted = evaluate_interrupted(run, "replicates=2", "max_images=8", *QUICK, asked)
    assert interrupted
    kept = json.loads((run / "evaluation.json").read_text(), parse_constant=refuse_constant)
    assert kept["interrupted"] is True
    assert kept["bpd"] == figure
    assert kept["results"]["ema"]["num_images"] == 8


@pytest.mark.parametrize("calls", [0, 2])
def test_ctrl_c_before_the_evaluation_proper_stops_it(calls, runs, tmp_path, monkeypatch):
    """While the steps are measured, or in the pilot: what comes of half of it must not steer an evaluation."""
    run = runs.copy("ddpm", tmp_path)
    stop_after(calls, monkeypatch, MLPDenoiser, "forward")
    with pytest.raises(SettingError, match="interrupted"):
        evaluate_interrupted(run, "max_images=64", *QUICK)
    assert not (run / "evaluation.json").exists()


def test_ctrl_c_prints_the_table_so_far_and_exits_as_a_shell_expects(runs, tmp_path):
    run = runs.copy("vae", tmp_path)
    process = begin(*CPU, f"run={run}", "replicates=8000", "iwae_samples=10", cwd=tmp_path, script="evaluate.py")
    deadline = time.monotonic() + 100
    while "/1440000" not in process.printed() and time.monotonic() < deadline:
        time.sleep(0.1)
    before = process.printed()
    os.kill(process.pid, signal.SIGINT)
    done = process.finish(timeout=60)
    assert done.returncode == 130, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "interrupted" in done.stdout + done.stderr
    rest = done.stdout.removeprefix(before)
    assert "total" in rest
    kept = record(run)
    assert kept["interrupted"] is True
    assert kept["results"]["ema"]["num_images"] == 180
    assert 2 <= kept["results"]["ema"]["replicates"] < 8000
    assert f"{kept['bpd']:.4f}" in rest


@pytest.mark.parametrize(
    ("overrides", "start"),
    [([], "error: run= is missing"), (["run=nowhere", "split=test"], "error: run=nowhere does not exist")],
)
def test_the_command_refuses_in_one_line_from_anywhere(overrides, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "evaluate.py"), *CPU, *overrides])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert str(stop.value.code).startswith(start)  # a text: Python prints it to stderr and exits with 1
    assert "\n" not in stop.value.code
    assert not list(tmp_path.iterdir())
