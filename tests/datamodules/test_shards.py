"""Shards give back what was written, in files of bounded size, and refuse what is not whole."""

import json
import pickle

import numpy as np
import pytest
import torch

from datamodules import DamagedShardsError, shards
from datamodules.shards import MANIFEST, Manifest, ShardedImages, write_split

SHAPE = (3, 4, 4)
IMAGES = np.random.default_rng(0).integers(0, 256, (50, *SHAPE), dtype=np.uint8)


def write(folder, images=IMAGES, shard_bytes=48 * 12, pieces=(7, 30)):
    folder.mkdir(exist_ok=True)
    files = write_split(folder, "train", SHAPE, len(images), shard_bytes, iter(np.split(images, pieces)))
    Manifest("some", SHAPE, 256, {"train": files}).write(folder)
    return files


def read(folder):
    manifest = Manifest.read(folder)
    return ShardedImages(folder, manifest.splits["train"], manifest.image_shape)


@pytest.mark.parametrize("pieces", [(), (1, 2, 49), (12, 24), (7, 30)])
def test_what_was_written_is_read_in_any_order(tmp_path, pieces):
    files = write(tmp_path, pieces=pieces)
    assert [file.num for file in files] == [12, 12, 12, 12, 2]
    assert np.array_equal(np.concatenate([np.load(tmp_path / file.file) for file in files]), IMAGES)
    index = torch.tensor([49, 0, 11, 12, 12, 36, 35])
    assert np.array_equal(read(tmp_path).index_select(0, index), IMAGES[index])
    assert len(read(tmp_path)) == 50


def test_the_second_half_of_the_indices_is_mirrored(tmp_path):
    write(tmp_path)
    batch = read(tmp_path).index_select(0, torch.tensor([3, 53, 99]))
    assert np.array_equal(batch, np.stack([IMAGES[3], IMAGES[3][..., ::-1], IMAGES[49][..., ::-1]]))


def test_rows_choose_images(tmp_path):
    files = write(tmp_path)
    some = ShardedImages(tmp_path, files, SHAPE, torch.tensor([40, 2, 13]))
    assert len(some) == 3
    assert np.array_equal(some.index_select(0, torch.arange(4)), np.stack([*IMAGES[[40, 2, 13]], IMAGES[40][..., ::-1]]))


def test_few_files_are_open_at_once_and_none_goes_to_another_process(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    images = read(tmp_path)
    assert np.array_equal(images.index_select(0, torch.arange(50).flip(0)), IMAGES[::-1])
    assert len(images.files) == 2
    other = pickle.loads(pickle.dumps(images))
    assert not other.files
    assert np.array_equal(other.index_select(0, torch.arange(50)), IMAGES)


def test_read_ahead_asks_for_exactly_the_images_bytes(tmp_path, monkeypatch):
    files, asked = write(tmp_path), []
    images = read(tmp_path)
    monkeypatch.setattr(shards.os, "posix_fadvise", lambda fd, start, num, advice: asked.append((start, num)))
    images.read_ahead(10, 26)  # two images of the first file, all of the second, two of the third
    header = files[0].bytes - 12 * 48
    assert asked == [(header + 10 * 48, 2 * 48), (0, header + 12 * 48), (0, header + 2 * 48)]


def refused(call, *words):
    with pytest.raises(DamagedShardsError) as error:
        call()
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_damage_is_refused_in_one_sentence(tmp_path):
    files = write(tmp_path)
    path = tmp_path / files[1].file
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused(lambda: read(tmp_path), str(path), "703 bytes and not 704")
    path.unlink()
    refused(lambda: read(tmp_path), str(path), "is missing")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(read(tmp_path).verify, str(path), "checksum")
    path.write_bytes(whole)
    images = read(tmp_path)
    images.verify()
    path.write_bytes(whole[:-1])
    refused(lambda: images.index_select(0, torch.tensor([23])), str(path), "too short")
    path.unlink()
    refused(lambda: read(tmp_path), "is missing")


def test_a_manifest_that_is_missing_damaged_or_of_another_version_is_refused(tmp_path):
    refused(lambda: read(tmp_path), f"data.root={tmp_path}", "prepare.py")
    write(tmp_path)
    path = tmp_path / MANIFEST
    text = path.read_text()
    of_other_kinds = ('"num": -5', '"num": "12"', '"num": 12.0', '"num": true', '"num": 0')
    for bad in (
        text[:-30], "[]", text.replace('"num"', '"nam"'), *(text.replace('"num": 12', other) for other in of_other_kinds),
        text.replace('"train"', '"val"'), json.dumps(json.loads(text) | {"splits": {"train": []}}),
        json.dumps(json.loads(text) | {"image_shape": [48]}), json.dumps(json.loads(text) | {"levels": 1}),
    ):  # fmt: skip
        path.write_text(bad)
        refused(lambda: read(tmp_path), str(path), "damaged")
    for num in (5, 13):
        path.write_text(text.replace('"num": 12', f'"num": {num}', 1))
        images = read(tmp_path)
        refused(lambda images=images: images.index_select(0, torch.tensor([0])), "train-00000.npy", f"other than {num} images")
    path.write_text(text.replace('"format": 1', '"format": 2'))
    refused(lambda: read(tmp_path), "format 2")


def test_the_digest_tells_images_apart_and_nothing_else(tmp_path):
    other = IMAGES.copy()
    other[30, 0, 0, 0] ^= 1
    for name, images in {"a": IMAGES, "b": IMAGES, "c": other}.items():
        write(tmp_path / name, images)
    one, same, different = (Manifest.read(tmp_path / name).digest() for name in "abc")
    assert one == same != different
