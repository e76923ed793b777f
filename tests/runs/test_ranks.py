"""N devices are one device: every figure and every checkpoint, uneven last batches, accumulation and shards included."""

import csv
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from runs.devices import shards_on_cpu
from tests.data_files import pictures, write_idx
from tests.evaluation.evaluations import evaluate_here
from tests.jobs import QUICK, begin, command, result, run_here, torchrun

DATA = (
    "data=mnist", "data.num_val=21", "data.batch_size=16", "logger=csv", "model/lr_scheduler=constant",
    "trainer.log_every_n_steps=1", "callbacks.pictures.every_n_epochs=1",
)  # fmt: skip
VAE = ("model=vae", "model.encoder.hidden_dim=16", "model.decoder.hidden_dim=16", "model.encoder.dropout=0.2", *DATA)
DDPM = (
    "model=ddpm", "model.network.base_channels=4", "model.network.channel_multipliers=[1,1]",
    "model.network.num_res_blocks=1", "model.network.attention_resolutions=[]", "model.num_steps=50", "model.val_calls=3",
    "model.test_calls=3", "trainer.accumulate_grad_batches=2", *DATA,
)  # fmt: skip
ON = {
    "fsdp on 2": (
        VAE,
        (
            "trainer=fsdp",
            "trainer.precision=32-true",
            "trainer.accelerator=cpu",
            "trainer.devices=2",
            "+callbacks.shards._target_=tests.probes.Shards",
        ),
    ),
    "ddp on 4": (DDPM, ("trainer=ddp_cpu", "trainer.devices=4")),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """17 test images: with batches of 16, the last has one row, and all ranks but one have none."""
    root = tmp_path_factory.mktemp("data")
    write_idx(root / "MNIST/raw/train-images-idx3-ubyte", pictures(21 + 70, 28, 28))
    write_idx(root / "MNIST/raw/t10k-images-idx3-ubyte", pictures(17, 28, 28, seed=1))
    return root


@pytest.fixture(scope="module", params=ON)
def pair(request, data, tmp_path_factory):
    """The same job on one device and on several: (settings, run on one, run on several)."""
    settings, devices = ON[request.param]
    if "fsdp" in request.param and not shards_on_cpu():
        pytest.skip("this PyTorch shards on GPUs only")
    settings = (*settings, f"paths.data_dir={data}")
    one, several = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("several")
    run_here(one, *settings)
    done = torchrun(int(request.param[-1]), *QUICK[2:], *settings, *devices, "hydra.run.dir=run", cwd=several)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"\wWarning", done.stderr)  # gloo has one of its own, for machines whose name does not resolve
    for rank, *held, whole in re.findall(r"rank (\d) holds (\d+) (\d+) (\d+) of (\d+)", done.stdout):
        assert [int(share) / int(whole) for share in held] == pytest.approx([0.5] * 3, abs=0.02), rank
    assert ("rank 0 holds" in done.stdout) == ("rank 1 holds" in done.stdout) == ("trainer=fsdp" in devices)
    return settings, one / "run", several / "run"


def rows(run):
    """{(step, metric): value} of metrics.csv, but for what a clock measured."""
    with (run / "metrics.csv").open() as file:
        return {
            (int(row["step"]), name): float(value)
            for row in csv.DictReader(file)
            for name, value in row.items()
            if value and "/" in name and "per_second" not in name
        }


def checkpoint(run, name="last"):
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def files(run):
    return {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}


def test_every_figure_is_the_same(pair):
    _, one, several = pair
    there, here = rows(one), rows(several)
    assert there.keys() == here.keys()
    assert {"train/loss", "train/grad_norm", "train/lr", "val/bpd", "test/bpd"} <= {name for _, name in there}
    for key, value in there.items():
        assert here[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key
    assert result(one)["devices"] == 1
    assert result(several)["devices"] > 1
    for name in ("parameters", "images_seen", "step", "protocol"):
        assert result(one)[name] == result(several)[name], name


def test_only_one_rank_writes_and_it_writes_the_same_files(pair):
    _, one, several = pair
    assert files(one) - {"config.yaml"} == files(several) - {"config.yaml"}
    assert (one / "samples" / "final.png").read_bytes() == (several / "samples" / "final.png").read_bytes()
    there, here = (np.loadtxt(run / "plots" / "kl_per_level.csv", delimiter=",", skiprows=1) for run in (one, several))
    np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-4)


def test_checkpoints_are_one_devices_in_every_key_shape_and_value(pair):
    _, one, several = pair
    there, here = checkpoint(one), checkpoint(several)
    assert there.keys() == here.keys()
    for name in ("state_dict", "current_model_state"):
        assert there[name].keys() == here[name].keys()
        for key, value in there[name].items():
            torch.testing.assert_close(here[name][key], value, rtol=1e-4, atol=1e-5)
    (theirs,), (ours,) = there["optimizer_states"], here["optimizer_states"]
    assert theirs["state"].keys() == ours["state"].keys()
    for index, moments in theirs["state"].items():
        assert {key: value.shape for key, value in moments.items()} == {
            key: value.shape for key, value in ours["state"][index].items()
        }


def test_either_goes_on_on_one_device_and_what_one_device_began_goes_on_in_shards(pair, tmp_path):
    settings, *runs = pair
    figures = []
    for index, run in enumerate(runs):
        copy = tmp_path / str(index) / "run"
        shutil.copytree(run, copy)
        run_here(copy.parent, *settings, "trainer.max_epochs=3", "ckpt=last")
        figures.append(rows(copy))
    if "model=vae" in settings:
        shutil.copytree(runs[0], tmp_path / "shards")
        more = ("hydra.run.dir=shards", "trainer.max_epochs=3", "ckpt=last", "compile=eager")
        done = torchrun(2, *QUICK[2:], *settings, *ON["fsdp on 2"][1], *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        figures.append(rows(tmp_path / "shards"))
    assert len({step for step, name in figures[0] if name == "val/bpd"}) == 3
    for other in figures[1:]:
        assert other.keys() == figures[0].keys()
        assert list(other.values()) == pytest.approx(list(figures[0].values()), rel=1e-4, abs=1e-4)


def test_ctrl_c_stops_all_ranks_after_one_batch_and_the_run_that_goes_on_is_the_same(data, tmp_path):
    """Only the first rank hears it; in the middle of an epoch, with a DDPM's next validation still to come."""
    lengths = ("trainer.max_epochs=12", "trainer.check_val_every_n_epoch=12")
    few = ("trainer.log_every_n_steps=2", "trainer.accumulate_grad_batches=1", "callbacks.pictures=null", *lengths)
    settings = (*DDPM, f"paths.data_dir={data}", *few)
    run_here(tmp_path / "whole", *settings)
    job = (*QUICK[2:], *settings, "trainer=ddp_cpu", "hydra.run.dir=run")
    process, metrics = begin(*job, cwd=tmp_path), tmp_path / "run" / "metrics.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    stopped = process.finish(timeout=120)
    assert stopped.returncode == 130, stopped.stderr
    (step,) = re.findall(r"interrupted at step (\d+); to go on:", stopped.stdout)
    assert 4 < int(step) < 48
    assert int(step) % 2 == 0
    done = torchrun(2, *job, "ckpt=last", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    there, here = rows(tmp_path / "whole" / "run"), rows(tmp_path / "run")
    assert there.keys() == here.keys()
    for key, value in there.items():
        assert here[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key


def test_ranks_without_validations_save_the_terms_of_all_of_them(data, tmp_path):
    """Rows of three steps, epochs of four: the second row is of a step before the run went on, too."""
    settings = (*VAE, f"paths.data_dir={data}", "trainer.limit_val_batches=0", "trainer.log_every_n_steps=3")
    run_here(tmp_path / "whole", *settings)
    for length in ("trainer.max_epochs=1", "trainer.max_epochs=2"):
        job = (*QUICK[3:], *settings, length, "trainer=ddp_cpu", "hydra.run.dir=run", "ckpt=auto")
        done = torchrun(2, *job, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    there, here = rows(tmp_path / "whole" / "run"), rows(tmp_path / "run")
    assert {step for step, name in here if name == "train/loss"} == {2, 5}
    for key in there:
        if key[1].startswith("train/"):
            assert here[key] == pytest.approx(there[key], rel=1e-5, abs=1e-4), key


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_after_ranks_last_agreed_stops_them_before_the_test(number, code, data, tmp_path):
    """16 steps of which each sixth is logged; what is left to do then is the test."""
    settings = (*DDPM, f"paths.data_dir={data}", "trainer.log_every_n_steps=6", "trainer.accumulate_grad_batches=1")
    send = ("+callbacks.send._target_=tests.probes.Signals", f"+callbacks.send.number={int(number)}", "+callbacks.send.step=14")
    job = (*QUICK[2:], *settings, "trainer.max_epochs=4", "callbacks.pictures=null", "trainer=ddp_cpu", "hydra.run.dir=run")
    stopped = command(*job, *send, cwd=tmp_path)
    assert stopped.returncode == code, stopped.stderr
    assert "interrupted at step 16; to go on:" in stopped.stdout
    assert not (tmp_path / "run" / "result.json").exists()
    run_here(tmp_path, *settings, "trainer.max_epochs=4", "callbacks.pictures=null", "ckpt=last")  # only the test is left
    assert result(tmp_path / "run")["step"] in range(1, 17)


def test_either_is_evaluated_on_one_device(pair):
    settings, *runs = pair
    if "model=vae" in settings:  # every checkpoint is of the same kind, and this is the cheapest to evaluate
        figures = [evaluate_here(run, "batch_size=17")[0] for run in runs]
        assert figures[0] == pytest.approx(figures[1], rel=1e-5)
