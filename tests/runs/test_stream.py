"""Runs on streamed data are the runs of any data: the same on every number of ranks, and exact after they stopped."""

import csv
import itertools

import pytest
import torch

from callbacks import SeededBatches
from evaluation.saved import SavedRun
from runs.build import SettingError
from tests.jobs import QUICK, result, run_here, torchrun
from tests.runs.test_prepare import prepare


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets") / "digits"
    prepare("data=digits", f"out={root}", "shard_mb=0.02")
    stream = ("data=stream", f"data.root={root}", "data.image_shape=[1,8,8]", "data.levels=17", "data.block_size=8")
    return (*stream, "data.horizontal_flip=true", "model=vae", "logger=csv", "callbacks.pictures=null")


def figures(run):
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [float(row["val/bpd"]) for row in rows if row["val/bpd"]] + [result(run)["metrics"]["test/bpd"]]


def test_two_ranks_are_one_run_with_the_figures_of_one_rank(digits, tmp_path):
    run_here(tmp_path, *digits, "data.num_workers=0")
    done = torchrun(2, *QUICK[:1], *QUICK[2:], *digits, "trainer.devices=2", "hydra.run.dir=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = figures(tmp_path / "run"), figures(tmp_path / "two")
    assert len(one) == 3
    assert one == pytest.approx(two, abs=1e-4)
    assert result(tmp_path / "two")["devices"] == 2
    assert result(tmp_path / "run")["protocol"]["dataset"] == "digits"
    saved = SavedRun.open(str(tmp_path / "run"))
    assert saved.data().sizes == {"train": 1437, "val": 180, "test": 180}
    with pytest.raises(SettingError, match=r"data.root=.*elsewhere has no manifest.json"):
        saved.data(str(tmp_path / "elsewhere"))


@pytest.fixture
def watched(monkeypatch):
    """Calls ``watched(job, stop)``; returns the training batches of the job, which Ctrl-C ends at batch ``stop``."""
    usual = SeededBatches.on_train_batch_start

    def watch(job, stop=None):
        seen, count = [], itertools.count()

        def on_train_batch_start(self, trainer, module, images, batch_idx):
            if next(count) == stop:
                raise KeyboardInterrupt
            seen.append(images.clone())
            usual(self, trainer, module, images, batch_idx)

        monkeypatch.setattr(SeededBatches, "on_train_batch_start", on_train_batch_start)
        if stop is None:
            job()
        else:
            with pytest.raises((SystemExit, KeyboardInterrupt)):
                job()
        return seen

    return watch


@pytest.mark.parametrize("batch", [14, 22])
def test_a_run_that_stops_goes_on_with_the_next_batch_to_the_same_end(digits, batch, tmp_path, watched):
    """Batch 14 is in the middle of the second of three epochs, 22 is the first of the third."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = (*digits, "trainer.max_epochs=3", "data.num_workers=1")
    expected = watched(lambda: run_here(whole, *common))
    before = watched(lambda: run_here(parts, *common), stop=batch)
    after = watched(lambda: run_here(parts, *common, "ckpt=last"))
    assert [len(seen) for seen in (expected, before, after)] == [33, batch, 33 - batch]
    assert all(torch.equal(one, other) for one, other in zip(expected, before + after, strict=True))
    ends = [torch.load(path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"] for path in (whole, parts)]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
