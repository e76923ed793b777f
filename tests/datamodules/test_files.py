"""Files in their true formats are read back exactly; missing and damaged ones cost one sentence."""

import gzip
import pickle
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from datamodules import (
    CIFAR10DataModule,
    DynamicBinarization,
    FashionMNISTDataModule,
    MissingDataError,
    MNISTDataModule,
    NoBinarization,
    StaticBinarization,
    SVHNDataModule,
)
from tests.data_files import CIFAR10_FILES, write_cifar10, write_svhn

SHARED = {"batch_size": 8, "seed": 0, "num_val": 10, "download": False}
GREY = SHARED | {"image_shape": [1, 28, 28], "levels": 256}
COLOUR = SHARED | {"image_shape": [3, 32, 32], "levels": 256}
BITS = GREY | {"levels": 2}
RNG = np.random.default_rng(0)


def pictures(num, *shape):
    return RNG.integers(0, 256, (num, *shape), dtype=np.uint8)


def write_idx(path, images, magic=0x803):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = struct.pack(">4I", magic, *images.shape) + images.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def idx(tmp_path):
    train, test = pictures(50, 28, 28), pictures(21, 28, 28)
    write_idx(tmp_path / "MNIST/raw/train-images-idx3-ubyte", train)
    write_idx(tmp_path / "MNIST/raw/t10k-images-idx3-ubyte", test)
    return tmp_path, train, test


def build(cls, root, **settings):
    data = cls(root=str(root), **settings)
    data.prepare_data()
    data.setup()
    return data


def as_set(images):
    return sorted(bytes(np.asarray(image)) for image in images)


def check(data, train, test):
    """The training file is train and val together, each image once; the test file is test, in order."""
    assert as_set(torch.cat([data.splits["train"][: data.sizes["train"]], data.splits["val"]])) == as_set(train)
    assert np.array_equal(data.splits["test"], test)
    assert data.sizes == {"train": len(train) - 10, "val": 10, "test": len(test)}
    assert all(batch.dtype == torch.uint8 for batch in data.train_dataloader())


def fails(cls, error, root, **settings):
    start = time.perf_counter()
    with pytest.raises(error) as raised:
        build(cls, root, **settings)
    message = str(raised.value)
    assert time.perf_counter() - start < 2
    assert "\n" not in message
    assert raised.value.__cause__ is None
    return message


def test_idx(idx):
    root, train, test = idx
    data = build(MNISTDataModule, root, **GREY, binarization=NoBinarization())
    check(data, train[:, None], test[:, None])
    assert data.describe() == "mnist: 40/10/21 images of 1x28x28, 256 levels"
    assert data.protocol()["num_val"] == 10


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("folder", ["", "FashionMNIST/raw"])
def test_fashion_mnist_compressed_or_not_in_either_folder(tmp_path, ending, folder):
    train, test = pictures(30, 28, 28), pictures(12, 28, 28)
    write_idx(tmp_path / folder / f"train-images-idx3-ubyte{ending}", train)
    write_idx(tmp_path / folder / f"t10k-images-idx3-ubyte{ending}", test)
    check(build(FashionMNISTDataModule, tmp_path, **GREY, binarization=NoBinarization()), train[:, None], test[:, None])


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-py"])
def test_cifar10(tmp_path, folder):
    batches = [pictures(10, 3072) for _ in range(6)]
    write_cifar10(tmp_path / folder, batches)
    train, test = np.concatenate(batches[:5]).reshape(-1, 3, 32, 32), batches[5].reshape(-1, 3, 32, 32)
    data = build(CIFAR10DataModule, tmp_path, **COLOUR, horizontal_flip=True)
    check(data, train, test)
    flipped = as_set(train) + as_set(train[..., ::-1])
    assert all(bytes(image.numpy()) in flipped for batch in data.train_dataloader() for image in batch)


def test_cifar10_of_another_layout_is_not_scrambled(tmp_path):
    write_cifar10(tmp_path, [np.zeros((4, 32, 32, 3), dtype=np.uint8)] * 6)
    message = fails(CIFAR10DataModule, ValueError, tmp_path, **COLOUR)
    assert "(4, 32, 32, 3) is not one row of 3072 numbers" in message


def test_cifar10_pickles_hold_arrays_and_nothing_else(tmp_path):
    for name in CIFAR10_FILES:
        (tmp_path / name).write_bytes(pickle.dumps({"data": socket.getdefaulttimeout}))
    message = fails(CIFAR10DataModule, ValueError, tmp_path, **COLOUR)
    assert "getdefaulttimeout" in message
    assert str(tmp_path / "data_batch_1") in message


@pytest.mark.parametrize("folder", ["", "SVHN"])
def test_svhn(tmp_path, folder):
    splits = {"train": pictures(30, 3, 32, 32), "test": pictures(11, 3, 32, 32)}
    write_svhn(tmp_path / folder, splits)
    check(build(SVHNDataModule, tmp_path, **COLOUR), splits["train"], splits["test"])


def test_split_depends_on_split_seed_only(idx):
    def held_out(**settings):
        return build(MNISTDataModule, idx[0], **{**GREY, **settings}, binarization=NoBinarization()).splits["val"]

    assert torch.equal(held_out(), held_out(seed=9))
    assert not torch.equal(held_out(), held_out(split_seed=9))


def epoch_images(data, loader, epoch):
    """The epoch's images in the order of the data set."""
    loader.sampler.set_epoch(epoch)
    images = torch.cat(list(loader))
    return images[torch.cat([record.indices for record in loader.sampler]).argsort()]


def test_static_bits_are_fixed_and_dynamic_bits_are_redrawn_in_training_only(idx):
    static = build(MNISTDataModule, idx[0], **BITS, binarization=StaticBinarization())
    dynamic = build(MNISTDataModule, idx[0], **BITS, binarization=DynamicBinarization())
    other = build(MNISTDataModule, idx[0], **{**BITS, "seed": 7}, binarization=DynamicBinarization())
    for data in (static, dynamic):
        train, val = data.train_dataloader(), data.val_dataloader()
        first, second = epoch_images(data, train, 0), epoch_images(data, train, 1)
        assert torch.equal(first, second) == (data is static)
        assert torch.equal(first, epoch_images(data, train, 0))
        assert torch.equal(epoch_images(data, val, 0), epoch_images(data, val, 1))
        assert first.max() == 1
    assert all(torch.equal(static.scored(split), dynamic.scored(split)) for split in ("train", "val", "test"))
    assert torch.equal(static.scored("train"), static.splits["train"])
    assert torch.equal(dynamic.splits["test"], other.splits["test"])
    assert not torch.equal(
        epoch_images(dynamic, dynamic.train_dataloader(), 0), epoch_images(other, other.train_dataloader(), 0)
    )
    assert static.describe().endswith("2 levels (static binarisation)")
    assert static.protocol()["binarization"] == "static"


@pytest.mark.parametrize("cls", [MNISTDataModule, FashionMNISTDataModule, CIFAR10DataModule, SVHNDataModule])
@pytest.mark.parametrize("download", [False, True])
def test_missing_files_without_network(tmp_path, monkeypatch, cls, download):
    def unreachable(*args, **kwargs):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    grey = issubclass(cls, MNISTDataModule)
    settings = (GREY | {"binarization": NoBinarization()} if grey else COLOUR) | {"download": download}
    message = fails(cls, MissingDataError, tmp_path, **settings)
    assert str(tmp_path / cls.folder) in message
    assert all(name in message for name in (*cls.train_files, *cls.test_files, "data.root", cls.name))
    assert ("Name or service not known" in message) if download else ("data.download=true" in message)
    assert socket.getdefaulttimeout() is None


def test_of_ranks_that_begin_together_one_downloads_and_the_others_wait_for_it(tmp_path, monkeypatch):
    begun = []

    def fetch(self):
        begun.append(self)
        write_idx(self.root / "MNIST/raw/train-images-idx3-ubyte", pictures(50, 28, 28))
        time.sleep(0.5)  # half of it is there
        write_idx(self.root / "MNIST/raw/t10k-images-idx3-ubyte", pictures(21, 28, 28))

    monkeypatch.setattr(MNISTDataModule, "fetch", fetch)
    settings = GREY | {"binarization": NoBinarization(), "download": True, "root": str(tmp_path / "data")}
    ranks = [MNISTDataModule(**settings) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        wait = [pool.submit(rank.setup) for rank in ranks]  # without prepare_data, which is not called on all of them
    assert [one.exception() for one in wait] == [None] * 4
    assert len(begun) == 1
    assert all(torch.equal(rank.splits["train"], ranks[0].splits["train"]) for rank in ranks)


def test_only_what_is_missing_is_named(idx):
    root = idx[0]
    (root / "MNIST/raw/t10k-images-idx3-ubyte").unlink()
    message = fails(MNISTDataModule, MissingDataError, root, **GREY, binarization=NoBinarization())
    assert "t10k-images-idx3-ubyte.gz" in message
    assert "train-images" not in message


def test_damaged_files(idx, tmp_path):
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    whole = path.read_bytes()
    write_idx(path, pictures(20, 14, 14))
    small = path.read_bytes()
    for content in (whole[:-100], whole[:7], b"", b"\0\0\x08\x01" + whole[4:], small):
        path.write_bytes(content)
        message = fails(MNISTDataModule, ValueError, tmp_path, **GREY, binarization=NoBinarization())
        assert message.startswith(f"mnist: {path} is damaged")
    path.unlink()
    path.with_suffix(".gz").write_bytes(gzip.compress(whole)[:-200])
    assert "train-images-idx3-ubyte.gz is damaged" in fails(
        MNISTDataModule, ValueError, tmp_path, **GREY, binarization=NoBinarization()
    )


def test_bad_settings(idx):
    for bad, message in [({"num_val": 0}, "data.num_val=0: "), ({"num_val": 50}, "data.num_val=50: mnist has only 50 ")]:
        assert fails(MNISTDataModule, ValueError, idx[0], **{**GREY, **bad}, binarization=NoBinarization()).startswith(message)
    message = fails(MNISTDataModule, ValueError, idx[0], **GREY, binarization=StaticBinarization())
    assert message.startswith("data.levels=256: mnist has levels=2")
