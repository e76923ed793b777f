"""Every data set that is files trains: whole jobs on files that are written here in the true formats."""

import csv

import pytest

from tests.data_files import pictures, write_cifar10, write_folder, write_idx, write_svhn
from tests.jobs import QUICK, command, result, run_here
from tests.runs.ranks import RECORD, assert_ranks_agree

UNET = (
    "model.network.base_channels=4", "model.network.channel_multipliers=[1,1]", "model.network.num_res_blocks=1",
    "model.network.attention_resolutions=[]",
)  # fmt: skip
STEPS = ("model.val_calls=3", "model.test_calls=3", "model.num_steps=50")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_cifar10(root, [pictures(24, 3072, seed=i) for i in range(6)])
    write_idx(root / "MNIST/raw/train-images-idx3-ubyte", pictures(60, 28, 28))
    write_idx(root / "MNIST/raw/t10k-images-idx3-ubyte", pictures(20, 28, 28))
    write_svhn(root, {split: pictures(40, 3, 32, 32) for split in ("train", "test")})
    write_folder(root / "pictures", pictures(50, 20, 20, 3))
    return root


@pytest.mark.parametrize(
    "overrides",
    [
        ("data=mnist", "model=vae", "model/encoder=conv", "model/decoder=conv", "model.encoder.channels=[4,4]"),
        ("data=mnist", "data/binarization=dynamic", "model=mhvae", "model/likelihood=bernoulli"),
        ("data=mnist", "model=ddpm", *UNET, *STEPS),
        ("data=svhn", "model=ddpm", *UNET, *STEPS),
        ("data=image_folder", "data.image_size=16", "model=vae", "model/likelihood=discretized_logistic_mixture"),
        ("data=image_folder", "data.image_size=16", "data.max_memory_gb=0", "model=vae", "data.num_workers=1"),
    ],
    ids=lambda overrides: "-".join(part.split("=")[-1] for part in overrides[:3]),
)
def test_it_trains_and_is_scored(data, overrides, tmp_path):
    held_out = () if "data=image_folder" in overrides else ("data.num_val=10",)
    figure = run_here(
        tmp_path, *overrides, *held_out, f"paths.data_dir={data}", "data.batch_size=16", "logger=csv",
        "callbacks.pictures.every_n_epochs=0",
    )  # fmt: skip
    assert 0 < figure < 40
    assert result(tmp_path / "run")["step"] > 0
    assert (tmp_path / "run" / "samples" / "final.png").exists()


def test_two_ranks_on_cifar10_are_one_run_with_the_figures_of_one(data, tmp_path):
    """The mission's command, on CPU ranks and with a small U-Net: one output directory, one W&B run, the same val/bpd."""
    settings = (
        "model=ddpm", "data=cifar10", f"paths.data_dir={data}", "data.num_val=21", "data.batch_size=16", *UNET, *STEPS,
        "model.network.dropout=0.3",
    )  # fmt: skip
    run_here(tmp_path / "alone", *settings, "logger=csv")
    done = command(*QUICK[:1], *QUICK[2:], *settings, *RECORD, "trainer.devices=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (path for path in (tmp_path / "outputs").glob("*/*") if path.parent.name != "wandb")
    assert run.name.endswith("-ddpm-cifar10")
    assert_ranks_agree(run)
    assert len(list((tmp_path / "outputs" / "wandb").glob("offline-run-*"))) == 1
    one, two = scores(tmp_path / "alone" / "run"), scores(run)
    assert len(one["val/bpd"]) == 2
    assert two["val/bpd"] == pytest.approx(one["val/bpd"], abs=1e-4)
    assert two["images_seen"] == one["images_seen"] == [6 * 16, 12 * 16]
    assert result(run)["metrics"]["test/bpd"] == pytest.approx(result(tmp_path / "alone/run")["metrics"]["test/bpd"], abs=1e-4)
    assert result(run)["devices"] == 2


def scores(run):
    """{name: values} of the rows of validation."""
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/bpd"]]
    return {name: [float(row[name]) for row in rows] for name in ("val/bpd", "images_seen")}


def test_a_picture_that_one_rank_cannot_read_is_named_by_it(tmp_path):
    for split, num in {"train": 16, "val": 2, "test": 2}.items():
        write_folder(tmp_path / "pictures" / split, pictures(num, 8, 8, 3))
    bad = tmp_path / "pictures" / "val" / "001.png"  # of the second rank
    bad.write_bytes(b"no picture")
    done = command(
        *QUICK[:1], *QUICK[2:], "trainer.devices=2", "model=vae", "data=image_folder", "data.image_size=8", "data.batch_size=8",
        f"data.root={tmp_path}/pictures", "data.max_memory_gb=0", "data.num_workers=0", "logger=csv", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"error: image_folder: {bad} cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
