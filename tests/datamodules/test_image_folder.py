"""Folders of pictures: found, resized, cropped, split, and the same from memory as from disk."""

import contextlib
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import ImageFolderDataModule, MissingDataError, UnreadablePictureError
from datamodules.base import LostWorkerError
from datamodules.image_folder import Pictures
from tests.jobs import ROOT

SETTINGS = {"image_size": 8, "image_shape": [3, 8, 8], "levels": 256, "batch_size": 4, "seed": 0}
RNG = np.random.default_rng(0)


def write(folder, num, size=(8, 8), mode="RGB"):
    folder.mkdir(parents=True, exist_ok=True)
    shape = (num, *size, 3) if mode == "RGB" else (num, *size)
    images = RNG.integers(0, 256, shape, dtype=np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return torch.from_numpy(images).permute(0, 3, 1, 2) if mode == "RGB" else torch.from_numpy(images).unsqueeze(1)


def build(root, **settings):
    data = ImageFolderDataModule(root=str(root), **{**SETTINGS, **settings})
    data.prepare_data()
    data.setup()
    return data


def as_set(images):
    return sorted(image.numpy().tobytes() for image in images)


def test_given_splits_are_read_back_exactly(tmp_path):
    written = {
        split: write(tmp_path / split / "nested/deeper", num) for split, num in {"train": 9, "val": 3, "test": 2}.items()
    }
    data = build(tmp_path)
    assert all(as_set(data.splits[split]) == as_set(images) for split, images in written.items())
    assert data.describe() == "image_folder: 9/3/2 images of 3x8x8, 256 levels"
    assert data.protocol()["folder"] == tmp_path.name


def test_all_formats_that_a_folder_may_mix_are_found_and_other_files_left_alone(tmp_path):
    images = torch.from_numpy(RNG.integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)).expand(
        -1, -1, -1, 3
    )  # gif keeps greys exactly
    for image, name in zip(images, ("a.png", "b.gif", "c.TGA", "d.bmp", "e.ppm"), strict=True):
        Image.fromarray(image.numpy()).save(tmp_path / name)
    (tmp_path / "labels.csv").write_text("a,b")
    data = build(tmp_path)
    assert as_set(torch.cat(list(data.splits.values()))) == as_set(images.permute(0, 3, 1, 2))


def test_fractions_cut_one_folder_by_split_seed_only(tmp_path):
    everything = torch.cat([write(tmp_path / name, 10) for name in ("cats", "dogs")])
    data = build(tmp_path, val_fraction=0.2, test_fraction=0.1)
    assert data.sizes == {"train": 14, "val": 4, "test": 2}
    assert as_set(torch.cat(list(data.splits.values()))) == as_set(everything)
    again, moved = build(tmp_path, val_fraction=0.2, seed=4), build(tmp_path, val_fraction=0.2, split_seed=4)
    assert torch.equal(again.splits["val"], data.splits["val"])
    assert as_set(moved.splits["val"]) != as_set(data.splits["val"])


def test_val_is_cut_from_train_if_only_test_is_given(tmp_path):
    train, test = write(tmp_path / "train", 10), write(tmp_path / "test", 5)
    data = build(tmp_path)
    assert data.sizes == {"train": 9, "val": 1, "test": 5}
    assert as_set(torch.cat([data.splits["train"], data.splits["val"]])) == as_set(train)
    assert as_set(data.splits["test"]) == as_set(test)


def test_grey(tmp_path):
    written = write(tmp_path, 10, mode="L")
    data = build(tmp_path, channels=1, image_shape=[1, 8, 8])
    assert as_set(torch.cat(list(data.splits.values()))) == as_set(written)


def test_shorter_side_is_resized_and_the_centre_kept(tmp_path):
    wide = np.zeros((16, 48, 3), dtype=np.uint8)
    wide[:, 16:32] = 200
    for i in range(5):
        Image.fromarray(wide).save(tmp_path / f"{i}.png")
    picture = build(tmp_path, batch_size=1).splits["train"][0]
    assert (picture[:, :, 2:6] == 200).all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_streaming_gives_the_batches_of_memory(tmp_path, num_workers):
    write(tmp_path, 20)
    memory = build(tmp_path, horizontal_flip=True)
    stream = build(tmp_path, horizontal_flip=True, max_memory_gb=0, num_workers=num_workers)
    assert stream.num_workers == num_workers
    context = stream.train_dataloader().multiprocessing_context
    assert not num_workers or context.get_start_method() != "fork"  # a copy of a process with threads may hang
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        pairs = zip(getattr(memory, loader)(), getattr(stream, loader)(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_a_killed_worker_is_told_in_a_sentence(tmp_path):
    write(tmp_path, 40)
    data = build(tmp_path, max_memory_gb=0, num_workers=1)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        list(loader)  # its workers wait for the next pass
        for worker in loader._iterator._workers:
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
        with pytest.raises(LostWorkerError, match=r"^a process that reads images was killed, .*: set data.num_workers lower"):
            list(loader)


KILLED = """
import os, signal, sys
from datamodules import ImageFolderDataModule
if __name__ == "__main__":
    shared = {"image_size": 8, "image_shape": [3, 8, 8], "levels": 256, "batch_size": 4, "seed": 0}
    data = ImageFolderDataModule(root=sys.argv[1], max_memory_gb=0, num_workers=2, **shared)
    data.setup()
    loader = data.train_dataloader()
    list(loader)  # its workers wait for the next pass
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes where Linux lists them")
def test_nothing_outlives_a_killed_run(tmp_path):
    write(tmp_path / "pictures", 40)
    (tmp_path / "killed.py").write_text(KILLED)
    mark = f"MARK={tmp_path}"
    done = subprocess.run(
        [sys.executable, tmp_path / "killed.py", tmp_path / "pictures"],
        env=os.environ | {"MARK": str(tmp_path), "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL

    def left():
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                found += [path] if mark in path.read_bytes().decode(errors="replace") else []
        return found

    deadline = time.monotonic() + 30  # a worker looks every five seconds
    while left() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left()


def test_pictures_of_sixteen_bits_are_those_of_eight_and_numbers_without_a_range_are_refused(tmp_path):
    ramp = np.tile(np.array([0, 48, 96, 144, 192, 240, 255, 1], dtype=np.uint8), (8, 1))
    Image.fromarray(ramp).save(tmp_path / "eight.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "sixteen.tif")
    (tmp_path / "sixteen.pgm").write_bytes(b"P5\n8 8\n65535\n" + (ramp.astype(">u2") * 257).tobytes())
    (tmp_path / "ten.pgm").write_bytes(b"P5\n8 8\n1023\n" + np.rint(ramp / 255 * 1023).astype(">u2").tobytes())
    Image.fromarray(ramp.astype(np.float32) / 255).save(tmp_path / "float.tif")
    Image.fromarray(ramp.astype(np.int32) * 10000).save(tmp_path / "wide.tif")
    for channels in (1, 3):
        decode = Pictures([], 8, channels).decode
        for name in ("sixteen.png", "sixteen.tif", "sixteen.pgm", "ten.pgm"):
            assert torch.equal(decode(tmp_path / name), decode(tmp_path / "eight.png"))
        for name in ("float.tif", "wide.tif"):
            with pytest.raises(UnreadablePictureError, match=rf"{name} holds 32-bit numbers .*convert it to 8 or 16 bits"):
                decode(tmp_path / name)


@pytest.mark.parametrize(("bits", "white_is_zero"), [(16, False), (16, True), (12, False)])
def test_tiff_says_how_many_bits_there_are_and_which_end_is_white(tmp_path, bits, white_is_zero):
    ramp = np.tile(np.array([0, 48, 96, 144, 192, 240, 255, 1]), (8, 1))
    kept = np.rint((255 - ramp if white_is_zero else ramp) / 255 * (2**bits - 1)).astype(np.uint16)
    # of twelve bits, two numbers share three bytes
    digits = "".join(f"{number:03x}" for number in kept.flatten())
    data = kept.astype("<u2").tobytes() if bits == 16 else bytes.fromhex(digits)
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8, 277: 1, 278: 8, 279: len(data)}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    file = struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + fields + bytes(4)
    (tmp_path / "scan.tif").write_bytes(file)
    assert Pictures([], 8, 1).decode(tmp_path / "scan.tif")[0].tolist() == ramp.tolist()


def test_pictures_too_large_to_be_decoded_are_not_called_damaged(tmp_path, monkeypatch):
    write(tmp_path, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(UnreadablePictureError, match=r"000.png has more than 40 pixels, .*: scale it down or take it away"):
        Pictures([], 8, 3).decode(tmp_path / "000.png")


def test_photographs_stand_as_their_camera_says(tmp_path):
    lying = Image.fromarray(np.repeat(RNG.integers(0, 256, (8, 1, 3), dtype=np.uint8), 8, 1))
    exif = Image.Exif()
    exif[274] = 6  # orientation: to be turned by a quarter
    lying.save(tmp_path / "photo.jpg", exif=exif, quality=100)
    standing = Pictures([], 8, 3).decode(tmp_path / "photo.jpg")
    assert standing.float().std(1).mean() < 3  # stripes from top to bottom
    assert standing.float().std(2).mean() > 20


def test_sixteen_bits_are_turned_as_eight_are(tmp_path):
    ramp = np.tile(np.arange(0, 256, 32, dtype=np.uint8), (8, 1))
    exif = Image.Exif()
    exif[274] = 3  # upside down
    for name, picture in {"eight": ramp, "sixteen": ramp.astype(np.uint16) * 257}.items():
        Image.fromarray(picture).save(tmp_path / f"{name}.png", exif=exif)
        turned = Pictures([], 8, 1).decode(tmp_path / f"{name}.png")[0]
        assert turned.tolist() == ramp[::-1, ::-1].tolist()


def test_linked_folders_are_read_once_and_round_in_no_circle(tmp_path):
    here, there = write(tmp_path / "all" / "cats", 9), write(tmp_path / "elsewhere" / "deeper", 6)
    (tmp_path / "all" / "dogs").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "all" / "dogs again").symlink_to(tmp_path / "elsewhere" / "deeper")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "all")
    data = build(tmp_path / "all")
    read = torch.cat([data.splits[split].index_select(0, torch.arange(num)) for split, num in data.sizes.items()])
    assert as_set(read) == as_set(torch.cat([here, there]))


def test_links_to_some_of_the_other_pictures_hold_these_out(tmp_path):
    images, apart = write(tmp_path / "images", 20), write(tmp_path / "images" / "apart", 5)
    (tmp_path / "test").symlink_to(tmp_path / "images" / "apart")
    (tmp_path / "val").mkdir()
    for i in range(8):
        (tmp_path / "val" / f"{i}.png").symlink_to(f"../images/{i:03}.png")
    splits = build(tmp_path).splits
    assert {split: as_set(of) for split, of in splits.items()} == {
        "train": as_set(images[8:]), "val": as_set(images[:8]), "test": as_set(apart)
    }  # fmt: skip


def test_a_link_whose_file_is_gone_is_named(tmp_path):
    write(tmp_path, 9)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UnreadablePictureError, match=r"gone.png cannot be read; repair it or take it away"):
        build(tmp_path, max_memory_gb=0)


def test_a_folder_that_is_called_like_a_picture_is_none(tmp_path):
    write(tmp_path / "train" / "cats.png", 8)
    write(tmp_path / "val", 1)
    write(tmp_path / "test", 1)
    assert build(tmp_path).sizes["train"] == 8


@pytest.mark.parametrize(("max_memory_gb", "num_workers"), [(2.0, 0), (0, 0), (0, 1)])
def test_unreadable_pictures_are_named(tmp_path, max_memory_gb, num_workers):
    write(tmp_path / "train", 8)
    write(tmp_path / "val", 1)
    write(tmp_path / "test", 1)
    bad = tmp_path / "train/bad.jpg"
    bad.write_bytes(b"no picture")
    with pytest.raises(UnreadablePictureError) as error:  # noqa: PT012
        data = build(tmp_path, max_memory_gb=max_memory_gb, num_workers=num_workers, batch_size=9)
        list(data.train_dataloader())
    assert str(error.value).startswith(f"image_folder: {bad} cannot be read")
    assert "\n" not in str(error.value)


def test_missing_folder(tmp_path):
    with pytest.raises(MissingDataError, match=r"image_folder: .*nowhere is no folder; set data.root") as error:
        build(tmp_path / "nowhere")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"image_size": 0}, "data.image_size=0: "),
        ({"channels": 4}, "data.channels=4: "),
        ({"val_fraction": 0}, "data.val_fraction=0: "),
        ({"test_fraction": float("inf")}, "data.test_fraction=inf: "),
        ({"test_fraction": 0.95}, "data.val_fraction=0.1 and data.test_fraction=0.95: "),
        ({"max_memory_gb": -1}, "data.max_memory_gb=-1: "),
        ({"num_workers": -1}, "data.num_workers=-1: "),
        ({"num_workers": 10**11}, "data.num_workers=100000000000: "),
        ({"image_shape": [3, 64, 64]}, "data.image_shape="),
    ],
)
def test_bad_settings(tmp_path, bad, message):
    with pytest.raises(ValueError, match="data") as error:
        ImageFolderDataModule(root=str(tmp_path), **{**SETTINGS, **bad})
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_pictures_are_resized_smoothly(tmp_path):
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    assert (Pictures([tmp_path / "a.png"], 8, 1).decode(tmp_path / "a.png").float() - 127.5).abs().max() < 16
