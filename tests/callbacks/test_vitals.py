"""What a run has seen and cost, over accumulation and sessions; tests/runs/test_job.py has several ranks."""

import csv
from types import SimpleNamespace

import pytest
import torch

from callbacks import Vitals, vitals
from tests.jobs import result, run_here

JOB = ("model=vae", "logger=csv", "trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=2")


def rows(directory, column):
    """[(step, images seen)] of the rows that have ``column``."""
    with (directory / "run" / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row["images_seen"])) for row in csv.DictReader(file) if row[column]]


def test_images_are_counted_as_the_optimiser_sees_them_and_on_when_a_run_goes_on(tmp_path):
    run_here(tmp_path, *JOB, "trainer.max_epochs=1")  # 11 batches: 5 pairs, and one alone at the end of the epoch
    first = result(tmp_path / "run")
    assert rows(tmp_path, "train/lr") == [(1, 512.0), (3, 1024.0), (5, 1408.0)]
    run_here(tmp_path, *JOB, "trainer.max_epochs=2", "ckpt=last")
    assert rows(tmp_path, "train/lr")[3:] == [(7, 1920.0), (9, 2432.0), (11, 2816.0)]
    assert rows(tmp_path, "val/bpd") == [(5, 1408.0), (11, 2816.0)]
    assert rows(tmp_path, "test/bpd") == [(6, 1408.0), (12, 2816.0)]
    record = result(tmp_path / "run")
    assert (first["images_seen"], record["images_seen"]) == (1408, 2816)
    assert record["seconds"]["train"] > first["seconds"]["train"] > 0
    assert record["seconds"]["total"] > record["seconds"]["train"]
    assert "images_seen" not in record["metrics"]
    run_here(tmp_path, *JOB, "trainer.max_epochs=2", "ckpt=last")  # nothing is left to train
    assert result(tmp_path / "run")["images_seen"] == 2816


def test_long_runs_are_counted_to_the_last_image(tmp_path, monkeypatch):
    plain = Vitals.on_train_start

    def start(self, trainer, module):
        plain(self, trainer, module)
        self.images_seen = 2**24 + 1  # float32 has no such number

    monkeypatch.setattr(Vitals, "on_train_start", start)
    run_here(tmp_path, "model=vae", "logger=csv", "trainer.max_epochs=1", "data.batch_size=127")
    assert rows(tmp_path, "val/bpd") == [(10, 2**24 + 1 + 11 * 127)]


def test_throughput_is_of_all_devices_since_the_last_row_and_without_validation(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(vitals.time, "monotonic", lambda: now[0])
    callback, module = Vitals(), SimpleNamespace(train_row={}, device=torch.device("cpu"))
    trainer = SimpleNamespace(global_step=0, log_every_n_steps=2, world_size=3)
    callback.on_train_start(trainer, module)
    for step in range(1, 5):
        now[0] += 0.5
        trainer.global_step = step
        callback.on_train_batch_end(trainer, module, None, torch.zeros(10), step)
        if step == 2:
            now[0] += 100
            callback.on_validation_end(trainer, module)
    assert module.train_row == {"train/images_per_second": pytest.approx(60), "images_seen": 120}


@pytest.mark.parametrize("fused", [True, False])
def test_the_gradients_norm_is_without_the_scale_of_float16(fused):
    """A fused optimiser takes the scale out in its own step, of the others' gradients Lightning has by then."""
    weight = torch.nn.Parameter(torch.zeros(4))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((2 * weight).sum()).backward()
    if not fused:
        weight.grad /= 1024
    module = SimpleNamespace(train_row={}, parameters=lambda: [weight])
    trainer = SimpleNamespace(global_step=1, log_every_n_steps=2, precision_plugin=SimpleNamespace(scaler=scaler))
    Vitals().on_before_optimizer_step(trainer, module, torch.optim.AdamW([weight], fused=fused))
    assert float(module.train_row["train/grad_norm"]) == 4.0
