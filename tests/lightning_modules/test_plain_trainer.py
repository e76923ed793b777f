"""Modules and callbacks under a ``lightning.Trainer`` as it comes, with loaders of one's own, as in a notebook."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from callbacks import EMA, Pictures, SeededBatches, Vitals
from datamodules import DigitsDataModule, StreamDataModule
from datamodules.shards import Manifest, write_split
from lightning_modules import VAELightningModule
from losses import Categorical
from losses.draws import mix
from networks import MLPDecoder, MLPEncoder
from runs.build import build_part
from tests.jobs import configure

X = torch.randint(0, 17, (24, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
KINDS = {"vae": ("model=vae",), "mhvae": ("model=mhvae",), "ddpm": ("model=ddpm", "model.num_steps=9", "model.val_calls=2")}


class Endless(IterableDataset):
    """Three batches, which nobody can count beforehand."""

    def __iter__(self):
        return iter(X.split(8))


class Batches(Callback):
    """Notes the images of each epoch."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.setdefault(trainer.current_epoch, []).append(batch.clone())


class Draws(Callback):
    """Notes one random number of each batch."""

    def __init__(self):
        self.drawn = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.drawn.append(torch.rand(()).item())


@pytest.fixture(params=KINDS)
def model(request, tmp_path):
    return build_part(configure(tmp_path, *KINDS[request.param]).model)


def plain(directory, *callbacks, **settings):
    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0} | settings
    return Trainer(
        accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False, default_root_dir=directory,
        callbacks=list(callbacks), **settings,
    )  # fmt: skip


def loader(batch_size=8):
    return DataLoader(X, batch_size=batch_size)


def test_training_goes_on_after_a_validation_between(model, tmp_path):
    """Which Lightning does in inference mode: what it makes there cannot be added to."""
    for trainer in (plain(tmp_path), plain(tmp_path, EMA(), SeededBatches(0))):
        trainer.fit(model, loader())
        trainer.validate(model, loader(5), verbose=False)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(model, loader(), loader(5))
        assert trainer.test(model, loader(5), verbose=False)[0]["test/bpd"] > 0


class CutOff(Callback):
    """Ends validation after its second batch, or training after its first."""

    def __init__(self, where):
        self.where = where

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if self.where == "validation" and batch_idx == 1:
            raise RuntimeError("cut off")

    def on_train_batch_end(self, *_):
        if self.where == "training":
            raise RuntimeError("cut off")


class Rows(DummyLogger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)


def test_what_was_cut_off_leaves_nothing_in_what_comes_next(tmp_path):
    other = DataLoader(torch.zeros_like(X), batch_size=8)
    model = build_part(configure(tmp_path, *KINDS["vae"], "model.optimizer.lr=0").model)

    def validated():
        torch.manual_seed(0)
        return plain(tmp_path).validate(model, loader(), verbose=False)[0]["val/bpd"], model.num_scored

    def trained(*callbacks, images):
        torch.manual_seed(0)
        model.train()  # Lightning leaves it as it is where a validation is cut off
        logger = Rows()
        plain(tmp_path, *callbacks, logger=logger, accumulate_grad_batches=2, log_every_n_steps=1).fit(model, images)
        return [row["train/bpd"] for row in logger.rows if "train/bpd" in row]

    alone = validated(), trained(images=loader())
    with pytest.raises(RuntimeError, match="cut off"):
        plain(tmp_path, CutOff("validation")).validate(model, other, verbose=False)
    with pytest.raises(RuntimeError, match="cut off"):
        trained(CutOff("training"), images=other)
    assert (validated(), trained(images=loader())) == alone


def test_a_row_of_training_is_of_all_batches_since_the_last_one_also_where_a_run_went_on_between(model, tmp_path):
    losses, elbos, logger, objective = [], [], Rows(), model.objective

    def noted(x):
        loss, elbo = objective(x)
        losses.append(loss.item())
        elbos.append(elbo.value.detach())
        return loss, elbo

    model.objective = noted
    for steps, earlier in ((4, None), (9, tmp_path / "own.ckpt")):
        trainer = plain(tmp_path, logger=logger, log_every_n_steps=3, max_steps=steps, max_epochs=-1)
        trainer.fit(model, loader(10), ckpt_path=earlier)  # of 10, 10 and 4 images
        trainer.save_checkpoint(tmp_path / "own.ckpt")
    assert [row["train/loss"] for row in logger.rows] == pytest.approx([sum(losses[i : i + 3]) / 3 for i in (0, 3, 6)])
    means = [torch.cat(elbos[i : i + 3]).mean().item() for i in (0, 3, 6)]
    assert [row["train/elbo"] for row in logger.rows] == pytest.approx(means)
    assert len(losses) == 9
    assert sum(row["train/reconstruction"] != 0 for row in logger.rows) == 3


def test_a_callback_counts_each_run_for_itself_and_the_sessions_of_one_together(tmp_path):
    vitals = Vitals()
    for _ in range(2):
        trainer = plain(tmp_path, vitals)
        trainer.fit(build_part(configure(tmp_path, *KINDS["vae"]).model), loader())
        assert vitals.images_seen == len(X)
    first = vitals.seconds
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, loader())
    assert vitals.images_seen == 2 * len(X)
    assert vitals.seconds > vitals.session_seconds > 0
    assert vitals.seconds == pytest.approx(first + vitals.session_seconds)


def test_pictures_are_of_the_images_that_a_loader_of_ones_own_gives(model, tmp_path, monkeypatch):
    data, shown = DigitsDataModule(image_shape=[1, 8, 8], levels=17, batch_size=32, seed=0), []
    monkeypatch.setattr(Pictures, "_profile", lambda self, trainer, module, x: shown.append(x))
    trainer = plain(tmp_path, Pictures(str(tmp_path), num=4), limit_train_batches=1, limit_val_batches=1)
    trainer.fit(model, data)
    for tested in (data, iter([X[:3], [X[3:5], torch.zeros(2)], X.repeat(3, 1, 1, 1)]), loader()):
        trainer.test(model, tested, verbose=False)
        assert (tmp_path / "samples" / "final.png").is_file()
    module, several, once = shown
    assert torch.equal(module, data.scored("test")[:64])
    assert torch.equal(several, torch.cat([X[:5], X.repeat(3, 1, 1, 1)])[:64])
    assert torch.equal(once, X)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_plain_trainer_has_written_loads_as_lightning_loads_it(kind, tmp_path):
    cfg = configure(tmp_path, *KINDS[kind]).model
    trainer, model = plain(tmp_path), build_part(cfg)
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    settings = OmegaConf.to_container(cfg, resolve=True)
    settings.pop("_target_")
    found = type(model).load_from_checkpoint(tmp_path / "own.ckpt", **instantiate(settings, _convert_="all"))
    assert all(map(torch.equal, found.parameters(), model.parameters()))
    with pytest.raises(FileNotFoundError):
        type(model).load_from_checkpoint(tmp_path / "none.ckpt")


class Saving(VAELightningModule):
    """Whose settings are plain numbers, and saved."""

    def __init__(self, hidden_dim, **settings):
        encoder, decoder = (partial(part, hidden_dim=hidden_dim) for part in (MLPEncoder, MLPDecoder))
        super().__init__(encoder, decoder, Categorical(17), **settings)
        self.save_hyperparameters()


def test_saved_hyperparameters_build_a_model_again(tmp_path):
    trainer, model = plain(tmp_path), Saving(16, latent_dim=2, image_shape=(1, 8, 8), levels=17)
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    found = Saving.load_from_checkpoint(tmp_path / "own.ckpt", weights_only=True)
    assert all(map(torch.equal, found.parameters(), model.parameters()))


def test_an_objective_in_inference_mode_is_in_nobodys_way(model):
    with torch.inference_mode():
        model.train().objective(X)
    model.objective(X)[0].backward()


@pytest.mark.parametrize("settings", [{"barebones": True}, {"log_every_n_steps": 0}])
def test_nothing_is_logged_where_nothing_is_to_be(settings, model, tmp_path):
    trainer = Trainer(accelerator="cpu", max_epochs=1, barebones=True) if "barebones" in settings else None
    trainer = trainer or plain(tmp_path, Vitals(), EMA(), SeededBatches(0), **settings)
    trainer.fit(model, loader())
    assert trainer.global_step == 3
    assert "train/loss" not in trainer.callback_metrics


def test_a_schedule_that_must_know_where_training_ends_refuses_loaders_without_a_length(tmp_path):
    def scheduled(schedule):
        return build_part(configure(tmp_path, "model=vae", f"model/lr_scheduler={schedule}").model)

    endless = DataLoader(Endless(), batch_size=None)
    with pytest.raises(ValueError, match=r"warmup_cosine needs to know how long training lasts: set trainer.max_epochs or"):
        plain(tmp_path).fit(scheduled("warmup_cosine"), endless)
    for schedule, settings in (("constant", {}), ("warmup_cosine", {"max_steps": 6, "max_epochs": -1})):
        trainer = plain(tmp_path, **settings)
        trainer.fit(scheduled(schedule), endless)
        assert trainer.global_step == settings.get("max_steps", 3)


def test_every_batch_has_draws_of_its_own_from_a_loader_without_a_length_too(tmp_path):
    def drawn(data):
        noted = Draws()
        plain(tmp_path, SeededBatches(0), noted, max_epochs=3).fit(build_part(configure(tmp_path, "model=vae").model), data)
        return noted.drawn

    for data in (loader(), DataLoader(Endless(), batch_size=None)):
        first = drawn(data)
        assert len(set(first)) == len(first) == 9
        assert drawn(data) == first


def test_ranks_draw_for_themselves_unless_the_loader_cuts_a_global_batch():
    def begin(rank, data):
        trainer = SimpleNamespace(
            global_rank=rank, strategy=SimpleNamespace(root_device=torch.device("cpu")), train_dataloader=data,
            current_epoch=1, num_training_batches=3,
        )  # fmt: skip
        callback = SeededBatches(5)
        callback.on_train_batch_start(trainer, None, None, 1)
        callback.on_train_batch_end(trainer, None, None, None, 1)
        return torch.initial_seed()

    data = DigitsDataModule(image_shape=[1, 8, 8], levels=17, batch_size=32, seed=0)
    data.setup()
    assert begin(0, loader()) == begin(0, data.train_dataloader()) == begin(1, data.train_dataloader()) == mix(5, "train", 4)
    assert len({begin(rank, loader()) for rank in range(4)}) == 4


def test_lightning_takes_the_batches_for_dealt_out_and_does_not_deal_them_again():
    """Over several ranks; tests of ranks train with its default, which wraps every other sampler."""
    data = DigitsDataModule(image_shape=[1, 8, 8], levels=17, batch_size=32, seed=0)
    data.setup()
    for made in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert isinstance(made.sampler, DistributedSampler)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_same_few_batches_are_trained_on_again_and_again(streamed, tmp_path):
    settings = {"image_shape": [1, 8, 8], "levels": 17, "batch_size": 32, "seed": 0}
    data = DigitsDataModule(**settings)
    data.setup()
    if streamed:
        files = {"train": write_split(tmp_path, "train", (1, 8, 8), 200, 10**6, iter([data.splits["train"][:200].numpy()]))}
        Manifest("some", (1, 8, 8), 17, files).write(tmp_path)
        data = StreamDataModule(str(tmp_path), True, num_val=20, num_test=20, block_size=4, num_workers=0, **settings)
    model, seen = build_part(configure(tmp_path, "model=vae").model), {}
    for overfit in (2, 0):
        noted = Batches()
        limits = {"limit_train_batches": 2, "limit_val_batches": 2} if not overfit else {"overfit_batches": overfit}
        plain(tmp_path, noted, max_epochs=3, **limits).fit(model, data)
        seen[overfit] = [torch.stack(noted.seen[epoch]) for epoch in range(3)]
    assert seen[2][0].shape == (2, 32, 1, 8, 8)
    assert all(torch.equal(seen[2][0], others) for others in seen[2][1:])
    assert not torch.equal(seen[0][0], seen[0][1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_refused_in_a_sentence(model, dtype):
    model.to(dtype)
    for use in (model.objective, model.elbo, lambda x: model.sample(len(x))):
        with pytest.raises(ValueError, match=f"the model's weights are {dtype}.*bf16-mixed"):
            use(X)


def test_the_posterior_says_what_an_encoder_must_give(tmp_path):
    for posterior in ("markov", "top_down"):
        model = build_part(configure(tmp_path, "model=mhvae", f"model/posterior={posterior}").model)
        model.posterior.encoder.forward = lambda x: (x, x)
        with pytest.raises(ValueError, match=r"the encoder gives tuple, not the losses.DiagGaussian"):
            model.elbo(X)
