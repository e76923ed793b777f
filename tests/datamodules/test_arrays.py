"""Arrays of images in .npz files: which array, which layout, which split, and nothing unpickled."""

import os

import numpy as np
import pytest

from datamodules import MissingDataError
from datamodules.arrays import ImageArray, find_arrays, layout
from tests.data_files import pictures


class Trap:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def read(path, num_bytes=1000):
    return np.concatenate(list(ImageArray.open(path).chunks(num_bytes)))


def test_published_downsampled_imagenet(tmp_path):
    """Rows of 3072 hold the red plane, then green, then blue."""
    data = pictures(30, 3, 32, 32)
    labels, mean = np.arange(1, 31), data.reshape(30, -1).mean(0)
    np.savez(tmp_path / "train_data_batch_1.npz", data=data.reshape(30, 3072), labels=labels, mean=mean)
    array = ImageArray.open(tmp_path / "train_data_batch_1.npz")
    assert array.image_shape == (3, 32, 32)
    chunks = list(array.chunks(3072 * 7))
    assert [len(chunk) for chunk in chunks] == [7, 7, 7, 7, 2]
    assert np.array_equal(np.concatenate(chunks), data)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_plain_arrays_of_every_layout(tmp_path, save):
    images = pictures(9, 3, 6, 5)
    for name, array in {"last": images.transpose(0, 2, 3, 1), "first": images}.items():
        save(tmp_path / f"{name}.npz", images=np.ascontiguousarray(array), labels=np.zeros(9, dtype=np.int64))
        assert np.array_equal(read(tmp_path / f"{name}.npz"), images), name
    save(tmp_path / "grey.npz", images[:, 0].copy())
    assert np.array_equal(read(tmp_path / "grey.npz"), images[:, :1])


def test_layouts_known_answers(tmp_path):
    known = {
        (5, 3072): ((3, 32, 32), False),
        (5, 12288): ((3, 64, 64), False),
        (5, 784): ((1, 28, 28), False),
        (5, 28, 28): ((1, 28, 28), False),
        (5, 32, 32, 3): ((3, 32, 32), True),
        (5, 1, 8, 8): ((1, 8, 8), False),
    }
    for shape, answer in known.items():
        assert layout(shape, tmp_path) == answer
    for shape in [(5, 100, 2, 2), (5, 3, 8, 3), (5, 77), (5, 8, 8, 4), (5, 0), (5,), (5, 0, 3, 3)]:
        with pytest.raises(ValueError, match="which is none of"):
            layout(shape, tmp_path)


def test_files_that_hold_no_images_or_more_are_refused_and_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = pictures(4, 3, 8, 8)
    path = tmp_path / "x.npz"
    for arrays, words in [
        ({"x": images.astype(np.float32)}, "float32"),
        ({"a": images, "b": images}, "a uint8"),
        ({"data": np.array([Trap()], dtype=object)}, "object"),
        ({"data": images[:0]}, r"data uint8\[0, 3, 8, 8\], has no image"),
        ({"data": np.asfortranarray(images)}, "data uint8.*is in Fortran's order: save numpy.ascontiguousarray of it"),
        ({"a": np.asfortranarray(images), "b": np.asfortranarray(images)}, "C order"),
        ({"data": images[:, :2]}, "none of"),
    ]:
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=words) as error:
            ImageArray.open(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_files_are_named(tmp_path, save):
    path = tmp_path / "x.npz"
    save(path, data=pictures(40, 3, 32, 32))
    whole = path.read_bytes()
    for bad in (whole[:-100], whole[:5000], b"", b"no archive", whole[:9000] + bytes([whole[9000] ^ 255]) + whole[9001:]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=rf"^source: {path} is damaged") as error:
            read(path)
        assert "\n" not in str(error.value)


def names(found):
    return {split: [array.path.name for array in arrays] for split, arrays in found.items()}


def test_names_say_the_split_and_numbers_the_order(tmp_path):
    for name in ("train_data_batch_10", "train_data_batch_2", "val_data"):
        np.savez(tmp_path / f"{name}.npz", data=pictures(2, 48))
    train = ["train_data_batch_2.npz", "train_data_batch_10.npz"]
    assert names(find_arrays(str(tmp_path))) == {"train": train, "test": ["val_data.npz"]}
    np.savez(tmp_path / "test.npz", data=pictures(2, 48))
    assert names(find_arrays(str(tmp_path))) == {"train": train, "val": ["val_data.npz"], "test": ["test.npz"]}
    assert names(find_arrays(f"{tmp_path}/train*.npz")) == {"train": train}
    (tmp_path / "more").mkdir()
    np.savez(tmp_path / "more/x.npz", data=pictures(2, 48))
    assert names(find_arrays(f"{tmp_path}/mo*/*.npz")) == {"train": ["x.npz"]}
    np.savez(tmp_path / "more/a[1].npz", data=pictures(2, 48))
    assert names(find_arrays(f"{tmp_path}/more/a[1].npz")) == {"train": ["a[1].npz"]}


def test_sources_that_cannot_work(tmp_path):
    with pytest.raises(MissingDataError, match=r"source=.*nowhere: found 0 .npz files"):
        find_arrays(str(tmp_path / "nowhere"))
    np.savez(tmp_path / "val.npz", data=pictures(2, 48))
    with pytest.raises(MissingDataError, match=r"found 1 .npz files, none of training images"):
        find_arrays(str(tmp_path))
    np.savez(tmp_path / "train.npz", data=pictures(2, 3072))
    with pytest.raises(ValueError, match=r"val.npz has images of \[3, 4, 4\], but .*train.npz of \[3, 32, 32\]"):
        find_arrays(str(tmp_path))


def test_data_that_is_no_image_is_not_passed_over_for_another_array(tmp_path):
    np.savez(tmp_path / "odd.npz", data=np.zeros((40, 3072)), mask=np.zeros((40, 784), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"odd.npz holds .*data.* where one array of images is expected"):
        ImageArray.open(tmp_path / "odd.npz")
