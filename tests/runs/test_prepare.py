"""prepare.py writes whole sets or nothing, from files of every kind."""

import errno
import io
import math
import os
import shlex
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from datamodules import arrays
from datamodules.shards import MANIFEST, Manifest, Shard, write_split
from runs.build import SettingError
from runs.preparation import run, summary
from tests.data_files import pictures, write_cifar10, write_folder
from tests.jobs import ROOT, command, run_here


def prepare(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        run(compose("prepare", list(overrides)))


def write_imagenet32(folder, num=40, num_val=21):
    """Two training files and the validation file, with the arrays of the published ones."""
    folder.mkdir(parents=True)
    for batch in (1, 2):
        data = pictures(num, 3072, seed=batch)
        np.savez(folder / f"train_data_batch_{batch}.npz", data=data, labels=np.ones(num, dtype=np.int64), mean=data.mean(0))
    np.savez(folder / "val_data.npz", data=pictures(num_val, 3072), labels=np.ones(num_val, dtype=np.int64))


def splits(folder):
    return {split: np.concatenate([np.load(p) for p in sorted(folder.glob(f"{split}-*.npy"))]) for split in ("train", "test")}


def test_the_command_writes_published_downsampled_imagenet(tmp_path):
    write_imagenet32(tmp_path / "published")
    done = command("source=published", "out=sets/imagenet32", "shard_mb=0.1", cwd=tmp_path, script="prepare.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "imagenet32: 80 train images (3 files), 21 test images (1 files) of 3x32x32, 256 levels, 0.3 MB in sets/imagenet32",
        "no val images: data=stream holds data.num_val=8 of the training images out",
        "python train.py data=stream data.root=sets/imagenet32 data.num_val=8 data.batch_size=72",
    ]
    found = splits(tmp_path / "sets/imagenet32")
    assert np.array_equal(found["train"].reshape(80, -1), np.concatenate([pictures(40, 3072, seed=i) for i in (1, 2)]))
    assert np.array_equal(found["test"].reshape(21, -1), pictures(21, 3072))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published", "sets"]


@pytest.mark.parametrize(("shape", "levels", "num", "name"), [((1, 8, 8), 17, 40, "my set (1)"), ((3, 5, 7), 256, 400, "2026")])
def test_the_command_that_is_printed_trains(shape, levels, num, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    images = np.random.default_rng(0).integers(levels, size=(num, *shape), dtype=np.uint8)
    manifest = Manifest("set", shape, levels, {"train": write_split(Path(name), "train", shape, num, 2**20, iter([images]))})
    manifest.write(Path(name))
    *_, line = summary(manifest, Path(name)).splitlines()
    _, script, *overrides = shlex.split(line)
    assert script == "train.py"
    assert math.isfinite(run_here(tmp_path, *overrides, "logger=csv", "callbacks.pictures=null"))


def test_what_is_printed_knows_the_defaults():
    large = Manifest("set", (3, 32, 32), 256, {"train": [Shard("a", 10**6, 1, "")]})
    assert summary(large, Path("set")).splitlines()[-1] == "python train.py data=stream data.root=set"


@pytest.mark.parametrize("num", [1, 2, 3])
def test_no_command_is_printed_that_could_only_be_refused(num, tmp_path, capsys):
    (tmp_path / "few").mkdir()
    np.savez(tmp_path / "few/train.npz", data=pictures(num, 3072))
    prepare(f"source={tmp_path}/few", f"out={tmp_path}/out")
    assert ("none would be left to train on" in capsys.readouterr().out) == (num < 3)
    assert (tmp_path / "out" / MANIFEST).is_file()


def test_help_loads_no_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "prepare.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "source=" in done.stdout
    assert "| hydra\n" in done.stderr
    assert " torch\n" not in done.stderr


def test_data_sets_of_this_framework_keep_their_splits(tmp_path):
    root = tmp_path / "files"
    write_cifar10(root, [pictures(24, 3072, seed=i) for i in range(6)])
    prepare("data=cifar10", f"data.root={root}", "data.num_val=20", f"out={tmp_path}/cifar10", "shard_mb=0.05")
    found = splits(tmp_path / "cifar10")
    assert [len(found[split]) for split in ("train", "test")] == [100, 24]
    assert np.array_equal(found["test"].reshape(24, -1), pictures(24, 3072, seed=5))


def test_folders_of_pictures(tmp_path):
    images = pictures(30, 16, 16, 3)
    write_folder(tmp_path / "pictures/train", images[:20])
    write_folder(tmp_path / "pictures/test", images[20:])
    prepare("data=image_folder", f"data.root={tmp_path}/pictures", "data.image_size=16", f"out={tmp_path}/out")
    found = splits(tmp_path / "out")
    assert len(found["train"]) == 18
    assert sorted(map(bytes, found["test"])) == sorted(map(bytes, np.ascontiguousarray(images[20:].transpose(0, 3, 1, 2))))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["source=published"], "out= is missing"),
        (["out=new"], "source= and data= are both missing"),
        (["out=new", "source=published", "data=digits"], "source= and data= are both given"),
        (["out=", "source=published"], "out=: give the folder"),
        (["out=published/val_data.npz/x", "source=published"], "val_data.npz is no folder that can be written to"),
        (["out=published", "source=published"], "out=published exists and is not overwritten"),
        (["out=new", "source=published", "shard_mb=-1"], "shard_mb=-1"),
        (["out=new", "source=nowhere"], "source=nowhere: found 0 .npz files"),
        (["out=new", "data=gaussian"], "continuous values"),
        (["out=new", "data=mnist", "data/binarization=dynamic"], "data/binarization=none"),
        (["out=new", "data=cifar10", "data.download=false"], "cifar-10-batches-py"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence_and_nothing_is_written(overrides, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_imagenet32(tmp_path / "published")
    with pytest.raises(SettingError) as error:
        prepare(*overrides)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_a_link_that_leads_nowhere_is_not_overwritten(tmp_path):
    write_imagenet32(tmp_path / "published")
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SettingError, match="out exists and is not overwritten"):
        prepare(f"source={tmp_path}/published", f"out={tmp_path}/out")


def test_a_damaged_file_and_a_full_disk_leave_nothing(tmp_path, monkeypatch):
    write_imagenet32(tmp_path / "published")
    path = tmp_path / "published/train_data_batch_2.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:50000] + bytes([whole[50000] ^ 255]) + whole[50001:])
    with pytest.raises(SettingError, match=r"train_data_batch_2.npz is damaged"):
        prepare(f"source={tmp_path}/published", f"out={tmp_path}/out")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 1000}))
    path.write_bytes(whole)
    with pytest.raises(SettingError, match=r"out=.* needs 0.3 MB"):
        prepare(f"source={tmp_path}/published", f"out={tmp_path}/out")
    monkeypatch.undo()

    def full(*_):  # which fills up while it is written to
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("numpy.lib.format.write_array_header_1_0", full)
    with pytest.raises(SettingError, match=r"out=.*/out cannot be written whole, and nothing of it is kept: No space left"):
        prepare(f"source={tmp_path}/published", f"out={tmp_path}/out")
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


@pytest.mark.parametrize("name", ["train_data_batch_2", "val_data"])
def test_a_file_that_holds_more_than_it_states_is_damaged_and_leaves_nothing(name, tmp_path):
    write_imagenet32(tmp_path / "published")
    array, path = pictures(21, 3072), tmp_path / f"published/{name}.npz"
    whole = io.BytesIO()
    np.save(whole, array)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.npy", whole.getvalue().replace(b"(21, 3072)", b"(20, 3072)"))
    with pytest.raises(SettingError, match=rf"{name}.npz is damaged \(it goes on after its last image\)"):
        prepare(f"source={tmp_path}/published", f"out={tmp_path}/out")
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    write_imagenet32(tmp_path / "published")
    usual = arrays.ImageArray.chunks

    def interrupted(self, num_bytes):
        yield from usual(self, num_bytes)
        raise KeyboardInterrupt

    monkeypatch.setattr(arrays.ImageArray, "chunks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(f"source={tmp_path}/published", f"out={tmp_path}/out")
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_a_folder_that_another_command_has_made_meanwhile_stays_as_it_is(tmp_path, monkeypatch):
    write_imagenet32(tmp_path / "published")
    usual = arrays.ImageArray.chunks

    def overtaken(self, num_bytes):
        yield from usual(self, num_bytes)
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "manifest.json").touch()

    monkeypatch.setattr(arrays.ImageArray, "chunks", overtaken)
    with pytest.raises(SettingError, match=r"out=\S* has been made by another command meanwhile"):
        prepare(f"source={tmp_path}/published", f"out={tmp_path}/out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "published"]


def test_a_preparation_that_was_killed_is_no_set_and_in_nobodys_way(tmp_path):
    write_imagenet32(tmp_path / "published")
    usual = arrays.ImageArray.chunks

    def killed(self, num_bytes):
        yield from usual(self, num_bytes)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        arrays.ImageArray.chunks = killed
        prepare(f"source={tmp_path}/published", f"out={tmp_path}/out", "shard_mb=0.05")
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (left,) = (path for path in tmp_path.iterdir() if path.name != "published")
    assert left.name.startswith("out.unfinished-")
    assert [path.suffix for path in left.iterdir()] == [".npy"] * 3
    with pytest.raises(SettingError, match=r"has no manifest.json"):
        run_here(tmp_path / "run", "data=stream", f"data.root={left}", "model=vae", "logger=csv")
    prepare(f"source={tmp_path}/published", f"out={tmp_path}/out")
    assert (tmp_path / "out" / MANIFEST).exists()
