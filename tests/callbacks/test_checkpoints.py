"""A run that has diverged says so early, and leaves nothing on disk that cannot be gone on from."""

import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.checkpoints import WholeFiles, all_finite
from lightning_modules import VAELightningModule
from runs.build import SettingError
from runs.directory import whole
from tests.jobs import result, run_here

JOB = (
    "model=vae",
    "logger=csv",
    "callbacks.pictures=null",
    "trainer.max_epochs=3",
    "model/lr_scheduler=constant",
)  # 11 steps an epoch
objective = VAELightningModule.objective


@pytest.fixture
def spoil(monkeypatch):
    """spoil(step, interrupt): the loss is NaN at ``step``, or an image comes from Ctrl-C one step later."""

    def apply(step, interrupt=None):
        def spoilt(self, x):
            loss, elbo = objective(self, x)
            if self.trainer.global_step == interrupt:
                raise KeyboardInterrupt
            return loss * (float("nan") if self.trainer.global_step == step else 1.0), elbo

        monkeypatch.setattr(VAELightningModule, "objective", spoilt)

    return apply


def last(tmp_path):
    """The step of last.ckpt; its weights and those of the average are finite."""
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    for weights in (checkpoint["state_dict"], checkpoint["current_model_state"]):
        assert all(value.isfinite().all() for value in weights.values())
    return checkpoint["global_step"]


@pytest.mark.parametrize(
    ("step", "every", "sentence"),
    [(14, 5, "train/loss is nan after 15 steps"), (14, 100, "val/elbo is nan after 22 steps")],
)
def test_divergence_ends_the_run_where_it_is_seen_and_a_retry_goes_on_from_finite_weights(
    step, every, sentence, spoil, monkeypatch, tmp_path
):
    spoil(step)
    with pytest.raises(SettingError, match=f"training diverged: {sentence}; lower model.optimizer.lr"):
        run_here(tmp_path, *JOB, f"trainer.log_every_n_steps={every}")
    assert last(tmp_path) == 11
    monkeypatch.setattr(VAELightningModule, "objective", objective)
    run_here(tmp_path, *JOB, "ckpt=last")
    assert result(tmp_path / "run")["step"] == 33


def test_ctrl_c_after_divergence_keeps_the_checkpoint_before_it(spoil, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    spoil(12, interrupt=14)
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            run_here(tmp_path, *JOB, "trainer.log_every_n_steps=100")
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from then on
    assert last(tmp_path) == 11


def test_the_last_is_a_copy_of_the_best_of_the_same_moment_and_else_its_own(tmp_path, monkeypatch):
    dumped, usual = [], WholeFiles.save_checkpoint

    def save(self, content, path, storage_options=None):
        dumped.append((Path(path).stem, content["global_step"]))
        usual(self, content, path)

    monkeypatch.setattr(WholeFiles, "save_checkpoint", save)
    run_here(tmp_path, *JOB, "trainer.max_epochs=2")
    best, kept = (tmp_path / "run" / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    assert dumped == [("best", 11), ("best", 22)]
    assert best.read_bytes() == kept.read_bytes()
    assert not best.samefile(kept)
    spoiled = ("model.optimizer.lr=1", "trainer.gradient_clip_val=null")
    run_here(tmp_path, *JOB, "trainer.max_epochs=3", "ckpt=last", *spoiled)
    assert dumped[2:] == [("last", 33)]
    assert torch.load(best, weights_only=True)["global_step"] == 22
    assert last(tmp_path) == 33


def test_weights_that_are_not_finite_are_not_gone_on_from(tmp_path):
    run_here(tmp_path, *JOB, "trainer.max_epochs=1")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    next(iter(checkpoint["state_dict"].values())).fill_(float("nan"))
    torch.save(checkpoint, path)
    with pytest.raises(SettingError, match="holds weights that are not finite"):
        run_here(tmp_path, *JOB, "ckpt=last")


def test_a_write_that_is_cut_short_leaves_the_file_before(tmp_path, monkeypatch):
    place, usual = tmp_path / "kept" / "last.ckpt", torch.save
    WholeFiles().save_checkpoint({"step": 1}, place)

    def cut_short(content, file):
        usual(content, file)
        Path(file).write_bytes(Path(file).read_bytes()[:100])
        raise KeyboardInterrupt  # SIGKILL does not even say so

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", cut_short)
        with pytest.raises(KeyboardInterrupt):
            WholeFiles().save_checkpoint({"step": 2}, place)
    assert torch.load(place, weights_only=True) == {"step": 1}
    assert list(place.parent.iterdir()) == [place]
    WholeFiles().save_checkpoint({"step": 3}, place)
    assert torch.load(place, weights_only=True) == {"step": 3}
    WholeFiles().save_checkpoint({"step": 4}, f"file://{place}")
    assert torch.load(place, weights_only=True) == {"step": 4}


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="limits the size of files as POSIX does")
def test_a_disk_that_is_full_is_said_in_one_sentence_and_leaves_the_file_before(tmp_path):
    import resource

    place, large = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    WholeFiles().save_checkpoint({"step": 1}, place)
    large.write_bytes(bytes(200_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="perhaps because the disk is full") as error:
            WholeFiles().save_checkpoint({"weights": torch.zeros(100_000)}, place)
        with pytest.raises(OSError, match="large") as of_copy:
            WholeFiles().copy_checkpoint(large, place)
        with pytest.raises(OSError, match="large"), whole(tmp_path / "record.json") as draft:
            draft.write_text("x" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == of_copy.value.filename == str(place)
    assert sorted(tmp_path.iterdir()) == [large, place]
    assert torch.load(place, weights_only=True) == {"step": 1}


class Counts(Callback):
    """Keeps what it counts in a type that only an unsafe load reads."""

    def state_dict(self):
        return {"counted": np.float64(3.0)}


def test_a_state_that_could_not_be_read_again_is_refused_when_it_is_written(tmp_path):
    with pytest.raises(SettingError, match=r"part 'Counts' holds numpy\.\S+, which weights_only=True does not read"):
        run_here(tmp_path, *JOB, "+callbacks.counts._target_=tests.callbacks.test_checkpoints.Counts")


class OnGpu(torch.Tensor):
    """Says that it lies elsewhere."""

    device = torch.device("cuda")


def test_weights_of_several_devices_are_looked_at_device_by_device(monkeypatch):
    """A rank's shards lie on its GPU, what is gathered for the file on the CPU."""
    stack = torch.stack

    def on_one_device(tensors):
        assert len({tensor.device for tensor in tensors}) == 1
        return stack(tensors)

    monkeypatch.setattr(torch, "stack", on_one_device)
    here, there, wrong = torch.ones(3), torch.ones(3).as_subclass(OnGpu), torch.tensor([1.0, math.nan])
    assert all_finite([here, there, torch.ones(3, dtype=torch.int64)])
    assert not all_finite([here, there, wrong])
    assert not all_finite([wrong.as_subclass(OnGpu), here])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(value, dtype):
    largest = torch.finfo(dtype).max
    fine = [torch.tensor([largest, -largest], dtype=dtype), torch.zeros(0, dtype=dtype), torch.tensor(1.0, dtype=dtype)]
    assert all_finite([*fine, torch.randn(65).to(dtype)])
    for place in (0, 31, 64):
        assert not all_finite([*fine, torch.randn(65).to(dtype).index_fill(0, torch.tensor(place), value)])
