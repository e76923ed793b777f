"""What a run leaves in W&B, read back from its file: nothing here asks the library that wrote it."""

import json

import pytest
import torch
import yaml

from lightning_modules import VAELightningModule
from loggers.wandb_run import BEST
from tests.jobs import QUICK, ROOT, command, run_here
from tests.wandb_file import read, values

JOB = ("model=vae", "logger.mode=offline", "seed=3", "callbacks.pictures.every_n_epochs=1")


def test_a_run_is_named_grouped_and_configured_from_its_choices(tmp_path):
    run_here(tmp_path, *JOB)
    found = read(tmp_path / "wandb")
    run = found["run"][0]
    assert (run.display_name, run.run_group, run.job_type) == ("vae-digits-s3", "vae-digits", "train")
    assert set(run.tags) == {"vae", "digits"}
    config = values(run.config.update)  # in the first record: known at the start, also of a run that is killed
    assert config["model"]["latent_dim"] > 0
    assert config["data"]["levels"] == 17
    assert config["seed"] == 3
    assert "${" not in str(config)
    assert (config["model_name"], config["likelihood"], config["encoder"]) == ("vae", "discretized_logistic", "mlp")
    assert run.run_id == (tmp_path / "run" / "wandb_id").read_text()
    metrics = {metric.name or metric.glob_name: metric for metric in found["metric"]}
    assert all(metrics[name].summary.min for name in ("val/bpd", "test/bpd"))
    assert all(metrics[name].summary.max for name in ("val/elbo", "test/elbo"))
    # drawn over optimiser steps; over images seen where a dashboard asks for it
    assert {metrics[name].step_metric for name in ("*", *BEST, "images_seen")} == {"trainer/global_step"}
    history = [values(record.item) for record in found["history"]]
    keys = {key for row in history for key in row}
    assert {f"{stage}/{term}" for stage in ("train", "val", "test") for term in ("bpd", "reconstruction", "prior")} <= keys
    assert {"train/lr", "train/grad_norm", "train/images_per_second", "images_seen"} <= keys
    seen = [row["images_seen"] for row in history if "train/lr" in row]
    assert seen == [128.0 * 5 * (i + 1) for i in range(len(seen))]
    for stage, images in (("val", [11 * 128.0, 22 * 128.0]), ("test", [22 * 128.0])):
        assert [row["images_seen"] for row in history if f"{stage}/bpd" in row] == images
    steps = [row["_step"] for row in history]
    assert steps == sorted(steps)
    pictures = {key.split(".")[0] for key in keys if key.startswith("pictures/")}
    (table,) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/profile/kl_per_level*.json")
    assert json.loads(table.read_text())["columns"] == ["t", "nats"]
    assert pictures == {"pictures/samples", "pictures/reconstructions", "pictures/kl_per_level"}
    assert found["exit"][-1].exit_code == 0


def test_what_a_sweep_of_wandb_optimises_is_a_plain_number_of_the_summary(tmp_path, monkeypatch):
    elbos = iter([-300.0, -200.0, -250.0])

    def worse_at_the_end(self, stage, metric):
        elbo = next(elbos) if stage == "val" else -210.0
        self.log_dict({f"{stage}/elbo": elbo, f"{stage}/bpd": -elbo / 100})

    monkeypatch.setattr(VAELightningModule, "_log_metric", worse_at_the_end)
    monkeypatch.setattr("runs.testing.write_result", lambda *_: None)
    run_here(tmp_path, *JOB, "trainer.max_epochs=3", "callbacks.pictures=null")
    found = read(tmp_path / "wandb")
    summary = {key: value for record in found["summary"] for key, value in values(record.update).items()}
    sweep = yaml.safe_load((ROOT / "conf" / "wandb" / "schedules.yaml").read_text())
    assert sweep["metric"] == {"name": "best/val/elbo", "goal": "maximize"}
    assert summary["best/val/elbo"] == -200.0


def test_a_run_that_goes_on_keeps_its_id(tmp_path):
    run_here(tmp_path, *JOB, "trainer.max_epochs=1")
    run_here(tmp_path, *JOB, "ckpt=last")
    files = [path.name for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")]
    assert len(files) == 2
    assert len(set(files)) == 1


def test_a_run_that_fails_shows_as_failed(tmp_path, monkeypatch):
    def out_of_memory(self, x):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(VAELightningModule, "objective", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        run_here(tmp_path, *JOB)
    found = read(tmp_path / "wandb")
    assert found["exit"][-1].exit_code == 1
    assert values(found["run"][0].config.update)["model"]
    import wandb

    assert wandb.run is None


def test_without_a_home_wandb_prints_nothing_of_its_own(tmp_path):
    ended = command("model=vae", "trainer.max_steps=2", "~callbacks.pictures", *QUICK[:2], cwd=tmp_path, HOME="")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("W&B: offline")
