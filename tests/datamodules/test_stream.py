"""Streamed training images: an order by blocks, cut over ranks like every other, in bounded memory."""

import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datamodules import BlockSampler, StreamDataModule
from datamodules.shards import Manifest, ShardedImages, write_split
from tests.data_files import pictures
from tests.jobs import ROOT

SHAPE = (3, 8, 8)
SETTINGS = {"image_shape": [3, 8, 8], "levels": 256, "batch_size": 12, "seed": 0, "block_size": 4, "num_workers": 0}
SETTINGS |= {"num_val": 11, "num_test": 7}
TRAIN, VAL, TEST = (pictures(num, *SHAPE, seed=num) for num in (100, 21, 22))


def write(folder, **splits):
    folder.mkdir(exist_ok=True)
    files = {name: write_split(folder, name, SHAPE, len(split), 192 * 30, iter([split])) for name, split in splits.items()}
    Manifest("some", SHAPE, 256, files).write(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("whole"), train=TRAIN, val=VAL, test=TEST)


def build(root, rank=0, world_size=1, **settings):
    data = StreamDataModule(root=str(root), **{**SETTINGS, **settings})
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    data.prepare_data()
    data.setup()
    return data


def epoch(loader, number=0, start=0):
    loader.sampler.set_epoch(number)
    loader.place = lambda: start
    return list(loader)


def make(num=1000, batch_size=20, block_size=16, epoch=0, seed=0, rank=0, world_size=1, mirror=False):
    sampler = BlockSampler(num, batch_size, block_size, seed, rank, world_size, mirror)
    sampler.set_epoch(epoch)
    return sampler


def order(sampler):
    return torch.stack([record.indices for record in sampler])


@pytest.mark.parametrize("block_size", [1, 7, 16, 3000])
def test_every_epoch_sees_every_image_at_most_once_in_an_order_of_its_own(block_size):
    orders = [order(make(1013, block_size=block_size, epoch=number)) for number in range(2)]
    for one in orders:
        assert one.shape == (50, 20)
        assert len(one.unique()) == 1000
        assert one.max() < 1013
    assert not torch.equal(*orders)
    assert torch.equal(orders[1], order(make(1013, block_size=block_size, epoch=1)))
    assert not torch.equal(orders[0], order(make(1013, block_size=block_size, seed=1)))


def test_a_row_uses_up_a_block_within_block_size_batches_and_shuffles_it():
    images = order(make(16 * 1250, batch_size=20)).T  # 20 lanes of 1000 images
    runs = [[len(list(run)) for _, run in itertools.groupby(lane.tolist(), lambda image: image // 16)] for lane in images]
    assert all(run == 16 for lane in runs for run in lane[1:-1])  # a lane's ends may cut a block
    inner = images[0, 16:32] % 16
    assert inner.tolist() != sorted(inner.tolist())


def test_one_image_after_another_is_as_if_drawn_at_random():
    """With blocks of one, the lag-one correlation of indices is that of a permutation; larger blocks mix within batches."""
    for block_size in (1, 16):
        images = order(make(16000, batch_size=100, block_size=block_size)).double()
        rows = torch.corrcoef(torch.stack([images[:, :-1].flatten(), images[:, 1:].flatten()]))[0, 1]
        assert abs(rows) < 0.04  # 15,840 pairs: standard deviation 0.008; blocks of 16 have 1,000 independent places


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_see_the_global_batches_of_one_rank_and_read_their_own_blocks(world_size):
    one = order(make(mirror=True, epoch=1))
    ranks = [order(make(mirror=True, epoch=1, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert torch.equal(torch.cat(ranks, 1), one)
    blocks = [set((images % 1000 // 16).flatten().tolist()) for images in ranks]
    shared = sum(len(a & b) for a, b in itertools.combinations(blocks, 2))
    assert shared <= world_size - 1  # only a block that the border between two ranks cuts


def test_half_of_the_images_are_mirrored_anew_each_epoch():
    flips = [(order(make(1000, 100, mirror=True, epoch=number)) >= 1000).float() for number in range(2)]
    for flip in flips:
        assert flip.mean().item() == pytest.approx(0.5, abs=0.06)  # 1,000 draws: standard deviation 0.016
    assert not torch.equal(*flips)


@pytest.mark.parametrize("flip", [False, True])
def test_batches_are_the_images_of_the_order(whole, flip):
    data = build(whole, horizontal_flip=flip)
    loader = data.train_dataloader()
    batches = epoch(loader, 3)
    indices = order(loader.sampler)
    both = torch.from_numpy(np.concatenate([TRAIN, TRAIN[..., ::-1]]))
    assert len(batches) == 8
    assert all(torch.equal(batch, both[index]) for batch, index in zip(batches, indices, strict=True))
    assert (indices.max() >= 100) == flip
    assert np.array_equal(torch.cat(list(data.val_dataloader())), VAL)
    assert np.array_equal(torch.cat(list(data.test_dataloader())), TEST)
    assert data.describe() == "some: 100/21/22 images of 3x8x8, 256 levels"
    assert data.protocol()["images_sha256"] == data.manifest.digest()


@pytest.mark.parametrize("world_size", [2, 4])
def test_uneven_evaluation_counts_every_image_once_over_ranks(whole, world_size):
    ranks = [list(build(whole, rank, world_size).val_dataloader()) for rank in range(world_size)]
    together = [torch.cat([rank[i] for rank in ranks if i < len(rank)]) for i in range(2)]
    assert np.array_equal(torch.cat(together), VAL)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing_and_a_pass_can_begin_anywhere(whole, num_workers):
    expected = epoch(build(whole, horizontal_flip=True).train_dataloader(), 2)
    loader = build(whole, horizontal_flip=True, num_workers=num_workers, prefetch=1).train_dataloader()
    for start in (0, 5, 8):
        rest = epoch(loader, 2, start)
        assert len(rest) == 8 - start
        assert all(torch.equal(one, other) for one, other in zip(rest, expected[start:], strict=True))


def test_a_pass_that_begins_late_reads_nothing_of_what_came_before(whole, monkeypatch):
    data = build(whole)
    loader, read = data.train_dataloader(), []
    usual = data.splits["train"].index_select
    monkeypatch.setattr(data.splits["train"], "index_select", lambda dim, index: read.append(len(index)) or usual(dim, index))
    epoch(loader, 0, start=6)
    assert read == [12, 12]


def as_set(images):
    return sorted(bytes(np.asarray(image)) for image in images)


@pytest.mark.parametrize("given", [{}, {"val": VAL}, {"test": TEST}])
def test_what_has_no_shards_is_held_out_by_split_seed(tmp_path, given):
    root = write(tmp_path, train=TRAIN, **given)
    data = build(root)
    cut = {"val": 11, "test": 7} | dict.fromkeys(given, 0)
    sizes = {split: len(given[split]) if split in given else cut[split] for split in cut}
    assert data.sizes == {"train": 100 - sum(cut.values()), **sizes}
    parts = {split: images.index_select(0, torch.arange(len(images))) for split, images in data.splits.items()}
    assert as_set(torch.cat([parts[split] for split in parts if split not in given])) == as_set(TRAIN)
    for split in cut.keys() - given.keys():
        again, moved = (build(root, **change).splits[split] for change in ({"seed": 5}, {"split_seed": 5}))
        assert torch.equal(again.rows, data.splits[split].rows)
        assert not torch.equal(moved.rows, data.splits[split].rows)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num_val": 0}, "data.num_val=0: "),
        ({"num_val": 60, "num_test": 40}, "data.num_val=60 and data.num_test=40: some has only 100 training images"),
        ({"block_size": 0}, "data.block_size=0: "),
        ({"block_size": 10**11}, "data.block_size=100000000000: "),
        ({"num_workers": -1}, "data.num_workers=-1: "),
        ({"num_workers": 10**11}, "data.num_workers=100000000000: "),
        ({"prefetch": 0}, "data.prefetch=0: "),
        ({"image_shape": [3, 32, 32]}, "data.image_shape=[3, 32, 32]: some has image_shape=[3, 8, 8]"),
        ({"levels": 2}, "data.levels=2: some has levels=256"),
        ({"batch_size": 83}, "data.batch_size=83 is larger than the 82 training images"),
        ({"batch_size": 15, "world_size": 2}, "data.batch_size=15 "),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(tmp_path, bad, message):
    root = write(tmp_path, train=TRAIN)
    with pytest.raises(ValueError, match="data") as error:
        build(root, **bad).train_dataloader()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_shrinks_while_it_is_read_is_named(tmp_path, num_workers):
    data = build(write(tmp_path, train=TRAIN), num_workers=num_workers)
    path = tmp_path / "train-00001.npy"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="has become too short") as error:
        epoch(data.train_dataloader())
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_shard_that_vanishes_is_named(tmp_path):
    data = build(write(tmp_path, train=TRAIN))
    path = tmp_path / "train-00001.npy"
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read: No such file or directory") as error:
        epoch(data.train_dataloader())
    assert str(error.value).startswith(str(path))


def test_verify_compares_checksums_reading_each_file_once(tmp_path, monkeypatch):
    path = write(tmp_path, train=TRAIN) / "train-00001.npy"
    read, usual = [], ShardedImages.verify
    monkeypatch.setattr(ShardedImages, "verify", lambda self: (read.append(self.folder), usual(self)))
    build(tmp_path, verify=True)
    assert len(read) == 1  # train, val and test are rows of the same files
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    build(tmp_path)
    with pytest.raises(ValueError, match=r"train-00001.npy is damaged"):
        build(tmp_path, verify=True)


IN_BOUNDED_MEMORY = """
import json, pathlib, re, resource, sys
import numpy as np, torch
from datamodules import StreamDataModule
from runs.preparation import from_arrays, write_set

def kilobytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

def passes():
    data = StreamDataModule(root="set", image_shape=[3, 32, 32], levels=256, batch_size=128, seed=0, num_workers=0)
    data.setup()
    return sum(len(batch) for loader in (data.train_dataloader(), data.test_dataloader()) for batch in loader)

torch.set_num_threads(1)
write_set(from_arrays("small"), pathlib.Path("warm"), "warm", 10**6)  # whatever is loaded late is loaded now
before = kilobytes("VmHWM")
limit = (kilobytes("VmData") + 64 * 1024) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
write_set(from_arrays("large"), pathlib.Path("set"), "set", 16 * 10**6)
seen = passes()
growth = kilobytes("VmHWM") - before
try:
    bites = np.load("set/train-00000.npy").repeat(8, 0) is None
except MemoryError:
    bites = True
print(json.dumps({"seen": seen, "growth": growth * 1024, "bites": bites}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_preparing_and_streaming_three_times_the_memory_cap(tmp_path):
    """184 MB of images in two files, prepared and read through under a cap of 64 MB on what may be allocated beyond torch."""
    for name, num in {"small": 100, "large": 30000}.items():
        (tmp_path / name).mkdir()
        for batch in (1, 2):
            data = np.random.default_rng(batch).integers(0, 256, (num, 3072), dtype=np.uint8)
            np.savez(tmp_path / name / f"train_data_batch_{batch}.npz", data=data)
    done = subprocess.run(
        [sys.executable, "-c", IN_BOUNDED_MEMORY], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seen"] == 50000 // 128 * 128 + 5000  # 5,000 each are held out for validation and test
    assert found["bites"]
    assert found["growth"] < 64e6  # resident memory, the pages of files included
