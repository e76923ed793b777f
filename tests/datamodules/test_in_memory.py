"""Digits, Gaussian data, binarisation, and every configuration file of the group."""

import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning import LightningModule, Trainer
from torch.utils._python_dispatch import TorchDispatchMode

from datamodules import (
    DigitsDataModule,
    DynamicBinarization,
    GaussianDataModule,
    ImageDataModule,
    NoBinarization,
    StaticBinarization,
)
from datamodules.base import MIRRORED_AT_ONCE
from datamodules.sampling import BatchRecord
from losses.draws import Rows, seeded

CONF = Path(__file__).parents[2] / "conf"
DIGITS = {"image_shape": [1, 8, 8], "levels": 17, "batch_size": 128, "seed": 0}
GAUSSIAN = {"image_shape": [1, 8, 8], "levels": None, "batch_size": 64, "seed": 0, "std": 3.0}
GAUSSIAN |= {"num_train": 4000, "num_val": 100, "num_test": 100}


def build(cls, **settings):
    data = cls(**settings)
    data.prepare_data()
    data.setup("fit")
    return data


def test_digits_splits_cover_the_set_once_and_do_not_move_with_the_seed():
    from sklearn.datasets import load_digits

    data, other = build(DigitsDataModule, **DIGITS), build(DigitsDataModule, **{**DIGITS, "seed": 5})
    assert all(torch.equal(data.splits[split], other.splits[split]) for split in data.splits)
    rows = torch.cat(list(data.splits.values())).flatten(1)
    truth = torch.from_numpy(load_digits().images).to(torch.uint8).flatten(1)
    assert sorted(rows.tolist()) == sorted(truth.tolist())
    moved = build(DigitsDataModule, **DIGITS, split_seed=1)
    assert not torch.equal(moved.splits["test"], data.splits["test"])
    assert data.describe() == "digits: 1437/180/180 images of 1x8x8, 17 levels"
    assert data.num_dims == 64
    assert not data.continuous


@pytest.mark.parametrize("binarization", [NoBinarization, StaticBinarization, DynamicBinarization])
def test_mirror_images_take_no_memory_beside_the_result(binarization):
    """A flip copies what it flips: so not all images at once, nor while those that were read are still there."""
    images = torch.randint(256, (2 * MIRRORED_AT_ONCE + 5, 1, 2, 3), dtype=torch.uint8)
    first, flips = [], []

    class Known(ImageDataModule):
        name = "known"

        def load(self):
            read = images.clone()
            first.append(weakref.ref(read))
            return {"val": images[:3].clone(), "test": images[:3].clone(), "train": read}

    class Flips(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.flip.default:
                flips.append((len(args[0]), first[0]() is None))
            return function(*args, **(kwargs or {}))

    rule = binarization()
    shape, levels = (1, 2, 3), rule.levels
    data = Known(shape, levels, 8, 0, actual_shape=shape, actual_levels=levels, flip=True, binarization=rule)
    with Flips():
        data.setup()
    assert max(num for num, _ in flips) == MIRRORED_AT_ONCE
    assert all(gone for _, gone in flips)
    once = rule.once(images, data._bits("train"), True)
    assert torch.equal(data.splits["train"], torch.cat([once, once.flip(-1)]))


def test_digits_batches():
    data = build(DigitsDataModule, **DIGITS)
    train, val = list(data.train_dataloader()), list(data.val_dataloader())
    assert {tuple(batch.shape) for batch in train} == {(128, 1, 8, 8)}
    assert len(train) == len(data.train_dataloader()) == 11
    assert [len(batch) for batch in val] == [128, 52]
    assert torch.equal(torch.cat(val), data.splits["val"])
    assert torch.equal(torch.cat(list(data.test_dataloader())), data.splits["test"])
    assert all(batch.dtype == torch.uint8 and batch.max() <= 16 for batch in train + val)


def test_setup_twice_reads_once():
    data = build(DigitsDataModule, **DIGITS)
    before = data.splits["train"]
    data.setup("test")
    assert data.splits["train"] is before


def test_rank_and_world_size_come_from_the_trainer():
    data = build(DigitsDataModule, **DIGITS)
    whole = next(iter(data.train_dataloader()))
    data.trainer = SimpleNamespace(global_rank=1, world_size=2)
    assert torch.equal(next(iter(data.train_dataloader())), whole[64:])


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.train_batches, self.val_batches = torch.nn.Parameter(torch.zeros(())), [], []

    def training_step(self, batch):
        self.train_batches.append(batch)
        return self.weight.square()

    def validation_step(self, batch):
        self.val_batches.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())


@pytest.mark.filterwarnings("ignore:The .* does not have many workers")
def test_lightning_sets_the_epoch_and_leaves_the_batches_alone():
    data, module = build(DigitsDataModule, **DIGITS), Recorder()
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, "accelerator": "cpu"}
    Trainer(**options, barebones=True, limit_val_batches=1.0).fit(module, datamodule=data)
    expected, loader = [], data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        expected.extend(loader)
    assert all(torch.equal(one, other) for one, other in zip(module.train_batches, expected, strict=True))
    assert not torch.equal(expected[0], expected[11])
    assert torch.equal(torch.cat(module.val_batches), torch.cat([data.splits["val"]] * 2))


def test_gaussian_is_gaussian_and_the_same_for_every_seed():
    data = build(GaussianDataModule, **GAUSSIAN)
    train = data.splits["train"]
    assert train.dtype == torch.float32
    assert train.mean().item() == pytest.approx(0, abs=0.03)  # 256,000 draws: standard error 0.006
    assert train.std().item() == pytest.approx(3, abs=0.03)
    assert data.continuous
    best = torch.distributions.Normal(0.0, 3.0).entropy().item() * 64
    assert data.describe() == f"gaussian: 4000/100/100 images of 1x8x8, continuous values; -ELBO is at best {best:.2f} nats"
    assert torch.equal(train, build(GaussianDataModule, **{**GAUSSIAN, "seed": 3}).splits["train"])
    assert not torch.equal(data.splits["val"], data.splits["test"])


@pytest.mark.parametrize("grey", [0, 1, 64, 200, 255])
def test_static_binarisation_draws_grey_over_255(grey):
    images = torch.full((1000, 1, 20, 20), grey, dtype=torch.uint8)
    bits = StaticBinarization().once(images, seeded(0), True)
    assert bits.dtype == torch.uint8
    assert bits.max() <= 1
    p = grey / 255
    assert bits.float().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / bits.numel()) ** 0.5)


@pytest.mark.parametrize("grey", [0, 64, 255])
def test_dynamic_binarisation_draws_grey_over_255(grey):
    record = BatchRecord(torch.arange(500), Rows(0, 500, 500), (0, 0, 0))
    images = torch.full((500, 1, 20, 20), grey, dtype=torch.uint8)
    bits, p = DynamicBinarization().each_time(images, record), grey / 255
    assert bits.float().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / bits.numel()) ** 0.5)


def test_bad_settings_are_refused_in_one_sentence():
    for cls, good, bad, message in [
        (DigitsDataModule, DIGITS, {"batch_size": 0}, "data.batch_size=0: "),
        (DigitsDataModule, DIGITS, {"batch_size": "many"}, "data.batch_size=many: "),
        (DigitsDataModule, DIGITS, {"seed": -1}, "data.seed=-1: "),
        (DigitsDataModule, DIGITS, {"image_shape": [1, 28, 28]}, "data.image_shape=[1, 28, 28]: "),
        (DigitsDataModule, DIGITS, {"levels": 16}, "data.levels=16: "),
        (GaussianDataModule, GAUSSIAN, {"std": 0}, "data.std=0: "),
        (GaussianDataModule, GAUSSIAN, {"num_val": 0}, "data.num_val=0: "),
        (GaussianDataModule, GAUSSIAN, {"image_shape": [8, 8]}, "data.image_shape=[8, 8]: "),
        (GaussianDataModule, GAUSSIAN, {"levels": 256}, "data.levels=256: "),
        (NoBinarization, {}, {"levels": 2}, "data.binarization.levels=2: "),
        (StaticBinarization, {}, {"levels": 256}, "data.binarization.levels=256: "),
    ]:
        with pytest.raises(ValueError, match="data") as error:
            cls(**{**good, **bad})
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"data.batch_size=1438 is larger than the 1437 training images"):
        build(DigitsDataModule, **{**DIGITS, "batch_size": 1438}).train_dataloader()


NAMES = [(path.stem, None) for path in sorted((CONF / "data").glob("*.yaml"))]
RULES = [path.stem for path in sorted((CONF / "data/binarization").glob("*.yaml"))]


@pytest.mark.parametrize(("name", "rule"), NAMES + [(name, rule) for name in ("mnist", "fashion_mnist") for rule in RULES])
def test_every_configuration_builds(name, rule, tmp_path):
    overrides = [f"+data={name}", "+seed=3", f"+paths.data_dir={tmp_path}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(overrides=overrides + [f"data/binarization={rule}"] * bool(rule))
    data = instantiate(cfg.data, _convert_="all")
    assert isinstance(data, ImageDataModule)
    assert data.seed == 3
    assert list(data.image_shape) == list(cfg.data.image_shape)
    assert data.levels == cfg.data.levels
    assert data.binarization.name == (rule or "none")
    assert rule not in ("static", "dynamic") or data.levels == 2
    assert data.name == name


def test_what_has_no_grey_levels_is_not_made_binary():
    with pytest.raises(ValueError, match="digits has no grey levels"):
        DigitsDataModule(image_shape=[1, 8, 8], levels=17, batch_size=8, seed=0, binarization=DynamicBinarization())
