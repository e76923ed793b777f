"""Whole jobs on real digits: what they leave and what they say."""

import csv
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import yaml

from tests.jobs import QUICK, ROOT, SMALL_DDPM, command, result, run_here, torchrun

MODELS = {"vae": ("model=vae",), "mhvae": ("model=mhvae",), "ddpm": SMALL_DDPM}
TERMS = ("bpd", "elbo", "reconstruction", "prior", "matching")


@pytest.mark.parametrize("model", MODELS)
def test_a_run_leaves_everything_and_the_same_names_for_every_model(model, tmp_path):
    figure = run_here(tmp_path, *MODELS[model], "logger.mode=offline", "callbacks.pictures.every_n_epochs=1")
    run = tmp_path / "run"
    record = result(run)
    metrics = record["metrics"]
    assert figure == record["objective"]
    value = metrics["test/reconstruction"] - metrics["test/prior"] - metrics["test/matching"]
    assert value == pytest.approx(metrics["test/elbo"], rel=1e-5)
    assert metrics["test/bpd"] == pytest.approx(-metrics["test/elbo"] / (64 * math.log(2)), rel=1e-5)
    assert 1.5 < metrics["test/bpd"] < 20
    assert 0 < metrics["test/bpd_se"] < 1
    assert sum(record["costs"][term]["bits_per_dim"] for term in ("reconstruction", "prior", "matching")) == pytest.approx(
        record["costs"]["elbo"]["bits_per_dim"], rel=1e-5
    )
    assert record["weights"] == "ema"
    assert record["protocol"]["levels"] == 17
    assert record["protocol"]["estimator"]
    assert torch.__version__.startswith(record["versions"]["torch"])
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert figure == pytest.approx(min(float(row["val/bpd"]) for row in rows if row["val/bpd"]), rel=1e-5)
    assert {f"{stage}/{term}" for stage in ("train", "val", "test") for term in TERMS} | {"train/loss"} <= set(rows[0])
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["image_shape"] == [1, 8, 8]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    pictures = {path.relative_to(run).as_posix() for path in run.rglob("*.png")}
    expected = {"samples/final.png", "samples/step_0000011.png", "samples/step_0000022.png", "plots/kl_per_level.png"}
    assert pictures == expected | ({"plots/reconstructions.png"} if model != "ddpm" else set())
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


def test_continuous_data_is_reported_in_nats_and_never_in_bits(tmp_path, capsys):
    figure = run_here(
        tmp_path, "model=ddpm", "data=gaussian", "logger=csv", "model.num_steps=2", "trainer.max_epochs=8", "data.std=0.5",
        "data.num_train=2048", "callbacks.pictures.every_n_epochs=0",
    )  # fmt: skip
    record = result(tmp_path / "run")
    assert figure == record["objective"]
    assert not [name for name in record["metrics"] if "bpd" in name]
    assert "bits" not in json.dumps(record["costs"])
    printed = capsys.readouterr().out
    assert "log-density" in printed
    assert "bits/dim" not in printed
    # no bound exceeds what the density itself would score
    entropy = record["protocol"]["image_shape"][1] ** 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.5))
    assert -record["metrics"]["test/elbo"] > entropy - 4 * record["metrics"]["test/elbo_se"]


def test_resuming_continues_the_count_and_gives_what_an_uninterrupted_run_gives(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = ("model=vae", "logger=csv", "model/lr_scheduler=constant")
    run_here(whole, *common, "trainer.max_epochs=4")
    run_here(parts, *common, "trainer.max_epochs=2")
    run_here(parts, *common, "trainer.max_epochs=4", "ckpt=last")
    one, other = result(whole / "run"), result(parts / "run")
    assert one["step"] == other["step"] == 44
    assert other["metrics"]["test/bpd"] == pytest.approx(one["metrics"]["test/bpd"], abs=1e-6)
    with (parts / "run" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["val/bpd"]]
    assert steps == [10, 21, 32, 43]


@pytest.mark.parametrize("model", ["vae", "ddpm"])
def test_bf16_moves_the_figure_by_less_than_a_thousandth(model, tmp_path):
    """The same weights, tested in both precisions: a run that is resumed at its end trains no more."""
    run_here(tmp_path / "a", *MODELS[model], "logger=csv")
    checkpoint = tmp_path / "a" / "run" / "checkpoints" / "last.ckpt"
    for name, precision in (("b", "32-true"), ("c", "bf16-mixed")):
        run_here(tmp_path / name, *MODELS[model], "logger=csv", f"ckpt={checkpoint}", f"trainer.precision={precision}")
    figures = [result(tmp_path / name / "run")["metrics"]["test/bpd"] for name in ("b", "c")]
    assert figures[0] != figures[1]
    assert figures[0] == pytest.approx(figures[1], rel=3e-4)  # 1e-3 at 3.3 bits/dim; a barely trained chain reads 12


def test_help_is_quick_and_names_every_group(tmp_path):
    done = command("--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("model: ddpm, mhvae, vae", "model/schedule: constant, cosine, jsd", "data: cifar10, digits", "Examples"):
        assert word in done.stdout
    assert "$" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_torchrun_starts_one_run_and_ckpt_auto_goes_on_with_it(tmp_path):
    common = [
        *QUICK[0:1],
        *QUICK[2:],
        *SMALL_DDPM,
        "model.num_steps=20",
        "trainer.devices=2",
        "hydra.run.dir=here",
        "ckpt=auto",
        "logger=csv",
        "model/lr_scheduler=constant",
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    first = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "train.py"),
         *common, "trainer.max_epochs=1"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    steps = [result(tmp_path / "here")["step"]]
    second = torchrun(2, *common, "trainer.max_epochs=2", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    steps.append(result(tmp_path / "here")["step"])
    assert steps == [11, 22]
    assert result(tmp_path / "here")["devices"] == 2
    assert not list(tmp_path.glob("outputs/*"))


def test_a_job_that_tries_something_out_leaves_nothing_and_takes_nothing(tmp_path, capsys):
    tries = ("model=vae", "trainer.fast_dev_run=true")
    run_here(tmp_path, *tries)
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("kept")
    run_here(tmp_path, *tries)
    assert (tmp_path / "run" / "notes.txt").read_text() == "kept"
    with pytest.raises(SystemExit) as end:
        run_here(tmp_path / "size", "model=vae", "callbacks=batch_size_finder", "callbacks.batch_size_finder.most=256")
    assert not end.value.code
    assert not list((tmp_path / "size").iterdir())
    assert "run directory" not in capsys.readouterr().out


@pytest.mark.parametrize("profiler", ["simple", "advanced"])
def test_a_profiler_says_what_it_found_in_the_run_directory(profiler, tmp_path, capsys):
    run_here(tmp_path, "model=vae", "logger=csv", "trainer.max_epochs=1", f"trainer.profiler={profiler}")
    assert "optimizer_step" in (tmp_path / "run" / "fit-profile.txt").read_text()
    assert "test_step" in (tmp_path / "run" / "test-profile.txt").read_text()
    assert "optimizer_step" not in capsys.readouterr().out


def test_a_run_of_one_picture_and_without_loggers_leaves_its_figures(tmp_path):
    run_here(
        tmp_path, "model=vae", "~logger", "callbacks.pictures.num=1", "trainer.max_epochs=1", "trainer.limit_val_batches=0"
    )
    assert result(tmp_path / "run")["objective"] is None  # nothing was validated, and JSON has no NaN
    assert result(tmp_path / "run")["metrics"]["test/bpd"] > 0


def test_a_test_of_some_batches_says_of_how_many_images_it_is(tmp_path, capsys):
    settings = ("model=vae", "logger=csv", "trainer.max_epochs=1", "data.batch_size=64", "callbacks.pictures=null")
    for limits, tested, title in (
        ((), 180, "test set, ema"),
        (("trainer.limit_test_batches=2",), 128, "128 of 180 test images, ema"),
    ):
        run_here(tmp_path / str(tested), *settings, *limits)
        assert result(tmp_path / str(tested) / "run")["protocol"]["num_tested"] == tested
        assert title in capsys.readouterr().out


def test_a_run_is_repeated_by_its_config_and_left_as_it_is(tmp_path):
    settings = ("model=vae", "model.latent_dim=3", "logger=csv", "seed=5", "ckpt=auto", "hydra.run.dir=first", *QUICK)
    assert command(*settings, cwd=tmp_path).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "first").rglob("*")}
    again = command("--config-dir", "first", "--config-name=config", "paths.output_dir=out", cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")
    (directory,) = (tmp_path / "out").glob("*/*-again")
    assert result(directory)["metrics"] == result(tmp_path / "first")["metrics"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "first").rglob("*")} == before
    assert {path.name for path in directory.iterdir()} == {path.name for path in (tmp_path / "first").iterdir()}
