"""What cannot work is refused in one sentence, before training, and nothing that is there is touched."""

import os

import pytest
import torch

from runs.build import SettingError
from runs.entry import told
from tests.jobs import command, configure, result, run_here


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.num_steps=0"], "num_steps"),
        (["model.num_steps=2.5"], "num_steps"),
        (["model/schedule=constant", "model.schedule.beta=1"], "schedule=constant"),
        (["model/schedule=linear", "model.num_steps=10"], "rescale=false"),
        (["model/network=unet_cifar10"], "8"),
        (["model=vae", "model/likelihood=bernoulli"], "2 levels"),
        (["model=vae", "model/likelihood=gaussian"], "density"),
        (["model=vae", "data=gaussian"], "continuous"),
        (["data=gaussian", "model/parameterization=lattice"], "continuous"),
        (["data.batch_size=0"], "data.batch_size=0"),
        (["data.batch_size=5000"], "data.batch_size=5000"),
        (["model.val_calls=1"], "val_calls"),
        (["model=mhvae", "model.depth=0"], "model.depth"),
        (["model=vae", "model.beta=-1"], "model.beta"),
        (["model=vae", "model.encoder.dropout=1.5"], "dropout"),
        (["callbacks.ema.decay=1"], "ema.decay"),
        (["callbacks.ema.decay=abc"], "callbacks.ema.decay=abc: give a number"),
        (["trainer.strategy=ddp_spawn"], "trainer.strategy=ddp_spawn would send the run to new processes"),
        (
            ["model._target_=tests.probes.Plain", "~model.network"],
            "tests.probes.Plain: derive it from lightning",
        ),
        (
            ["model=vae", "+callbacks.lr._target_=lightning.pytorch.callbacks.LearningRateFinder"],
            "have one of these fields",
        ),
        (["model=vae", "model.decoder.num_blocks=0"], "model.decoder.num_blocks=0: num_blocks must be"),
        (["model/schedule=sigmoid", "model.schedule.tau=-1"], "model.schedule: schedule=sigmoid needs start < end"),
        (["data=image_folder", "data.image_size=abc"], "data.image_size=abc: give an integer"),
        (["model=vae", "model.optimizer._target_=torch.optim.Adamm"], "torch.optim has no Adamm, is it Adam?"),
        (
            ["model=vae", "model.encoder._target_=nowhere.Net"],
            "model.encoder._target_=nowhere.Net: Python finds no",
        ),
        (["model.network.hidden_dim=0"], "model.network.hidden_dim=0: hidden_dim must"),
        (["model/schedule=constant", "model.schedule.beta=abc"], "model.schedule.beta=abc: give a number"),
        (["callbacks.pictures.num=0"], "pictures.num"),
        (["logger.mode=offlin"], "offlin"),
        (["trainer.precision=half"], "precision"),
        (["trainer.precision=bf16-true"], "bf16-mixed"),
        (["trainer.accelerator=tpu"], "trainer.accelerator=tpu: "),
        (["trainer.max_time=00:00:00:00"], "trainer.max_time=00:00:00:00: give DD:HH:MM:SS"),
        (["trainer.max_time=banana"], "trainer.max_time=banana: give DD:HH:MM:SS"),
        (["trainer.max_epochs=-1"], "trainer.max_epochs"),
        (["trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val=-1"),
        (["trainer.gradient_clip_val=.nan"], "trainer.gradient_clip_val="),
        (["trainer.max_epochs=1.5"], "trainer.max_epochs=1.5"),
        (["trainer.check_val_every_n_epoch=0"], "trainer.check_val_every_n_epoch=0"),
        (["trainer.log_every_n_steps=0"], "trainer.log_every_n_steps=0"),
        (["trainer.accumulate_grad_batches=2.5"], "trainer.accumulate_grad_batches=2.5"),
        (["trainer.limit_test_batches=0"], "trainer.limit_test_batches=0"),
        (["trainer.limit_train_batches=1.5"], "trainer.limit_train_batches=1.5"),
        (["trainer.num_nodes=2"], "trainer.num_nodes=2"),
        (["trainer.enable_progress_bar=abc"], "trainer.enable_progress_bar=abc"),
        (["model.optimizer.lr=abc"], "model.optimizer.lr=abc"),
        (["model.optimizer.lr=.inf"], "model.optimizer.lr="),
        (["+model.optimizer.bogus=1"], "bogus"),
        (["model.optimizer.betas=null"], "model.optimizer"),
        (["+model.weighting.bogus=4"], "bogus"),
        (["model.image_shape=[1,4,4]"], "model.image_shape=[1, 4, 4]"),
        (["model.val_calls=2.5"], "model.val_calls=2.5"),
        (["callbacks=early_stopping", "callbacks.early_stopping.monitor=train/loss"], "early_stopping.monitor=train/loss"),
        (["callbacks.pictures.num=1.5"], "callbacks.pictures.num=1.5"),
        (["model/parameterization=epsilon", "model/schedule=constant", "model.schedule.beta=0.5"], "sqrt(alpha_bar_T)"),
        (["data.levels=256"], "data.levels"),
        (["data=cifar10", "data.download=false"], "cifar-10-batches-py"),
        (["ckpt=last"], "ckpt=last"),
        (["ckpt=nowhere.ckpt"], "nowhere.ckpt"),
        (["seed=-1"], "seed"),
        (["model.optimizer.lr=-1"], "lr"),
        (["model.optimizer.lr=0"], "model.optimizer.lr=0: give a number above 0"),
        (["seed=4294967296"], "seed=4294967296"),
        (["trainer.overfit_batches=1.5"], "trainer.overfit_batches=1.5"),
        (["callbacks.seeding.seed=x"], "callbacks.seeding.seed=x"),
        (["model/lr_scheduler=warmup_cosine", "model.lr_scheduler.warmup_steps=1.5"], "model.lr_scheduler.warmup_steps=1.5"),
        (["+trainer.min_epochs=5", "trainer.max_epochs=2"], "trainer.min_epochs=5 is above trainer.max_epochs=2"),
        (["callbacks=early_stopping", "trainer.limit_val_batches=0"], "limit_val_batches=0 leaves none"),
        (["+trainer.logger=false"], "logger=csv or ~logger"),
        (["callbacks.ema=false"], "callbacks.ema=False: ~callbacks.ema leaves it out"),
        (["callbacks=early_stopping", "callbacks.early_stopping=false"], "~callbacks.early_stopping leaves it out"),
        (["+callbacks.own._target_=collections.OrderedDict"], "callbacks.own._target_=collections.OrderedDict: derive it"),
        (["trainer.val_check_interval=0", "trainer.check_val_every_n_epoch=1"], "trainer.val_check_interval=0: give"),
        (["trainer.val_check_interval=1.5"], "trainer.val_check_interval=1.5: give"),
        (["model.schedule=cosine"], "model.schedule=cosine is a choice, not a setting: give model/schedule=cosine"),
        (["model/schedule=linear", "model.num_steps=1000", "model.schedule.beta_start=-1"], "choose beta_start and beta_end"),
        (["model/schedule=linear", "model.num_steps=10"], "the ends are stretched by 1000/T"),
        (["trainer.max_epochs=null"], "trainer.max_epochs=null says nothing of where training ends"),
        (["callbacks=early_stopping", "callbacks.early_stopping.mode=min"], "val/elbo gets better with mode=max"),
        (["callbacks=early_stopping", "callbacks.early_stopping.monitor=val/bpd"], "val/bpd gets better with mode=min"),
        (["trainer.limit_test_batches=0.1"], "trainer.limit_test_batches=0.1: that is none of 2 test batches"),
        (["trainer.overfit_batches=0.01"], "trainer.overfit_batches=0.01: that is none of 11 train batches"),
        (["+callbacks.mine.monitor=x"], "callbacks.mine has no _target_"),
        (["data._target_=tests.probes.ForeignData"], "data._target_=tests.probes.ForeignData: derive it"),
        (["+trainer.default_root_dir=here"], "hydra.run.dir"),
        (["model.schedule.log_snr_min=nan"], "model.schedule.log_snr_min=nan: give a number"),
        (["model.schedule.log_snr_min=-inf"], "model.schedule: schedule=log_snr_linear with log_snr_max=6.5, log_snr_min=-inf"),
        (["model/schedule=linear", "model.num_steps=4", "model.schedule.beta_start=2"], "model.schedule: schedule=linear with"),
        (["model/schedule=constant", "model.schedule.beta=2", "model.num_steps=4"], "model.schedule.beta=2: schedule="),
        (["model/schedule=scaled_linear", "model.schedule.beta_end=-1"], "and beta_end=-1"),
        (["model/schedule=cosine", "model.schedule.s=-0.5"], "model.schedule.s=-0.5: schedule=cosine"),
        (["model.optimizer.betas=[0.9,abc]"], "betas=[0.9, 'abc']: give a list of 2 numbers, 'abc' is none"),
        (["model.optimizer.betas=[0.9,1.5]"], "betas=[0.9, 1.5], "),
        (["+model.optimizer.eps=-1"], "eps=-1: Invalid epsilon value"),
        (["data.split_seed=4294967296"], "data.split_seed=4294967296: give an integer of at least 0 and at most 4294967295"),
        (["data=gaussian", "data.num_val=100000000000"], "data.num_val=100000000000: memory does not hold so many"),
        (["callbacks.pictures.num=100000000000"], "callbacks.pictures.num=100000000000: give an integer of at least 1 and at"),
        (
            ["model=mhvae", "model.depth=1000000000"],
            "model.depth=1000000000 must be an integer of at least 1 and at most 10000",
        ),
        (["model.network.num_blocks=1000000000"], "model.network.num_blocks=1000000000: num_blocks must be an integer of at"),
        (
            ["data=image_folder", "data.channels=null"],
            "data.image_shape=[None, 64, 64]: give a list of integers, None (of data.ch",
        ),
        (['data.image_shape="[1,8,8]"'], "data.image_shape=[1,8,8]: give a list of integers, without quotes"),
        (['seed="0"'], "seed=0: give an integer from 0 to 4294967295, without quotes"),
        (["seed=true"], "seed=True: give an integer from 0 to 4294967295"),
        (["trainer.max_time=5"], "trainer.max_time=5: give DD:HH:MM:SS"),
        (["sweep=3"], "sweep=3: leave it alone, or set sweep.fresh or sweep.retry_failed"),
        (["trainer.devices=100000000000"], "trainer.devices=100000000000: give the number of devices of one machine"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_sentence_before_training(overrides, sentence, tmp_path):
    with pytest.raises(SettingError) as error:
        run_here(tmp_path, f"paths.data_dir={tmp_path}/data", "logger.mode=disabled", *overrides)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert told(error.value) == f"error: {error.value}"  # without a traceback
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_logger_that_wants_a_package_names_the_extra_that_has_it(tmp_path, monkeypatch):
    for package in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning.fabric.loggers.tensorboard.{package}", False)
    with pytest.raises(SettingError, match=r"^logger: tensorboard is not installed: pip install -e '\.\[tensorboard\]'$"):
        run_here(tmp_path, "model=vae", "logger=tensorboard", "trainer.max_epochs=1")


def test_checkpoints_of_other_models_broken_files_and_occupied_directories_are_refused(tmp_path):
    run_here(tmp_path / "a", "model=vae", "logger=csv", "trainer.max_epochs=1")
    checkpoint = tmp_path / "a" / "run" / "checkpoints" / "last.ckpt"
    with pytest.raises(SettingError, match="another model"):
        run_here(tmp_path / "b", "model=vae", "logger=csv", "model.latent_dim=8", f"ckpt={checkpoint}")
    with pytest.raises(SettingError, match=r"there model\._target_=.*VAELightningModule, here .*MHVAELightningModule"):
        run_here(tmp_path / "b", "model=mhvae", "logger=csv", f"ckpt={checkpoint}")
    with pytest.raises(SettingError, match=r"there model\.encoder\.dropout=0.2, here .*=None"):
        run_here(tmp_path / "b", "model=vae", "logger=csv", "~model.encoder.dropout", f"ckpt={checkpoint}")
    with pytest.raises(SettingError, match="already holds a run"):
        run_here(tmp_path / "a", "model=vae", "logger=csv")
    broken = tmp_path / "broken.ckpt"
    held = torch.load(checkpoint, weights_only=True)
    torch.save({name: value for name, value in held.items() if name != "optimizer_states"}, broken)
    with pytest.raises(SettingError, match="has no optimizer_states"):
        run_here(tmp_path / "c", "model=vae", "logger=csv", f"ckpt={broken}")
    for name, other in {
        "loops": {}, "optimizer_states": [], "lr_schedulers": 3, "global_step": "x", "callbacks": 5, "images": 5,
        "averaging_state": {}, "totals": {}, "training_terms": {"sums": None},
    }.items():  # fmt: skip
        torch.save(held | {name: other}, broken)
        with pytest.raises(SettingError, match=f"is damaged, as its {name} shows"):
            run_here(tmp_path / "c", "model=vae", "logger=csv", f"ckpt={broken}")
    torch.save(held | {"state_dict": [1]}, broken)
    with pytest.raises(SettingError, match="truncated, or was not written"):
        run_here(tmp_path / "c", "model=vae", "logger=csv", f"ckpt={broken}")
    weights = {name: value for name, value in held["state_dict"].items() if name != "encoder.net.1.0.weight"}
    torch.save(held | {"state_dict": weights}, broken)
    with pytest.raises(SettingError, match=r"has other weights than this model: .*encoder\.net\.1\.0\.weight"):
        run_here(tmp_path / "d", "model=vae", "logger=csv", "trainer.max_epochs=2", f"ckpt={broken}")
    broken.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(SettingError, match="truncated"):
        run_here(tmp_path / "c", "model=vae", "logger=csv", f"ckpt={broken}")
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1  # of some weight
    broken.write_bytes(content)
    with pytest.raises(SettingError, match="damaged"):
        run_here(tmp_path / "c", "model=vae", "logger=csv", f"ckpt={broken}")
    best = checkpoint.with_name("best.ckpt")
    kept = best.read_bytes()
    best.write_bytes(content)
    with pytest.raises(SettingError, match=r"best\.ckpt is damaged, and the run would be tested by it: move it away"):
        run_here(tmp_path / "a", "model=vae", "logger=csv", "ckpt=auto")
    best.write_bytes(kept)
    torch.save({"config": os.system}, broken)
    with pytest.raises(SettingError, match="truncated, or was not written"):
        run_here(tmp_path / "c", "model=vae", "logger=csv", f"ckpt={broken}")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(
        SettingError, match=r"last\.ckpt is damaged.*: give another checkpoint, as ckpt=(\S+best\.ckpt)$"
    ) as error:
        run_here(tmp_path / "a", "model=vae", "logger=csv", "ckpt=auto")
    run_here(tmp_path / "a", "model=vae", "logger=csv", "trainer.max_epochs=2", str(error.value).rpartition(" ")[2])
    assert result(tmp_path / "a" / "run")["step"] == 22


def test_a_refused_job_claims_nothing_and_may_be_tried_again_in_its_place(tmp_path):
    with pytest.raises(SettingError):
        run_here(tmp_path, "model=vae", "logger=csv", "data.batch_size=5000")
    with pytest.raises(SettingError, match="val_check_interval"):  # which Lightning refuses when it has begun
        run_here(tmp_path, "model=vae", "logger=csv", "trainer.max_epochs=1", "trainer.val_check_interval=50")
    run_here(tmp_path, "model=vae", "logger=csv", "trainer.max_epochs=1")
    assert result(tmp_path / "run")["step"] == 11


def test_the_command_works_from_anywhere_and_refuses_in_one_line(tmp_path):
    done = command("model=vae", "data.batch_size=0", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == ["error: data.batch_size=0: give an integer of at least 1"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model=vea", ["vea", "vae", "mhvae"]),
        ("modle=vae", ["modle is no setting: is it model?"]),
        ("experimnt=vae_conv", ["experimnt is no setting: is it experiment?"]),
        ("model/schedule=cosinus", ["cosinus", "log_snr_linear"]),
        ("model.num_stps=3", ["model.num_stps is no setting: is it model.num_steps?"]),
        ("model.quantum=3", ["model.quantum is no setting: python train.py --cfg job shows them all"]),
        ("trainer.benchmark=true", ["trainer.benchmark is no setting: ", "; +trainer.benchmark=true adds one"]),
        ("+train=False", ["train=False: nothing reads it; is it trainer?"]),
        ("+max_epochs=3", ["max_epochs=3: nothing reads it; is it trainer.max_epochs?"]),
        ("+optimizer.lr=3", ["optimizer.lr=3: nothing reads it; is it model.optimizer.lr?"]),
        ("max_epochs=3", ["max_epochs is no setting: is it trainer.max_epochs?"]),
        ("+trainer.max_epoch=3", ["trainer.max_epoch=3: make_trainer takes no such setting, is it max_epochs?"]),
        ("model.latent_dim=3", ["model.latent_dim is a setting of model=mhvae and of model=vae, not of what is chosen: add"]),
        ("model.latnt_dim=3", ["model.latnt_dim is no setting: is it model.latent_dim?"]),
        ("model/encodr=mlp", ["model/encodr is no setting: is it model/encoder"]),
        ("model/encoder=mlp", ["model/encoder: the model that is chosen has none; +model/encoder=mlp adds one"]),
        ("+model.network.hiden_dim=3", ["model.network.hiden_dim=3: MLPDenoiser takes no such setting, is it hidden_dim?"]),
        ("+data.horizontal_flip=true", ["data.horizontal_flip=True: DigitsDataModule takes no such setting; ~data.hor"]),
        ("seed=[", ["seed=["]),
        ("hydra.run.dir=/tmp/a=b", ["hydra.run.dir=/tmp/a=b", "quotes"]),
        ("hydra.run.dir=/proc/there/is/none", ["/proc/there", "hydra.run.dir"]),
        ("logger=null", ["logger=null", "~logger leaves it out"]),
        ("model/schedule=1", ["model/schedule=1: what is chosen of model/schedule is a name; give constant or cosine or"]),
        ("~data", ["data is missing: choose one, as python train.py --help lists them"]),
        ("~seed", ["seed is left out by ~seed, and the command reads it"]),
        ("experiment=null", ["experiment=null", "leave it out, as nothing is chosen of it by itself"]),
        ("paths.output_dir=null", ["paths.output_dir=null: give the folder"]),
        ("experiment=vae_conv", ["vae_conv_fashion_mnist"]),
        ("data.batch_size=${nothing}", ["nothing"]),
    ],
)
def test_what_hydra_refuses_is_one_line_too(override, words, tmp_path):
    done = command(override, cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words)
    assert not list(tmp_path.rglob("config.yaml"))


def test_config_is_checked_against_the_data(tmp_path):
    cfg = configure(tmp_path, "model=vae")
    assert cfg.model.levels == cfg.data.levels == 17
