"""Whole jobs on real digits: what they leave, what they refuse, how they stop and go on."""

import csv
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks import Pictures
from runs.build import SettingError
from runs.resuming import resume_command
from tests.jobs import QUICK, ROOT, SMALL_DDPM, begin, command, configure, result, run_here

MODELS = {"vae": ("model=vae",), "mhvae": ("model=mhvae",), "ddpm": SMALL_DDPM}
TERMS = ("bpd", "elbo", "reconstruction", "prior", "matching")


@pytest.mark.parametrize("model", MODELS)
def test_a_run_leaves_everything_and_the_same_names_for_every_model(model, tmp_path):
    figure = run_here(tmp_path, *MODELS[model], "logger.mode=offline", "callbacks.pictures.every_n_epochs=1")
    run = tmp_path / "run"
    record = result(run)
    metrics = record["metrics"]
    assert figure == record["objective"]
    value = metrics["test/reconstruction"] - metrics["test/prior"] - metrics["test/matching"]
    assert value == pytest.approx(metrics["test/elbo"], rel=1e-5)
    assert metrics["test/bpd"] == pytest.approx(-metrics["test/elbo"] / (64 * math.log(2)), rel=1e-5)
    assert 1.5 < metrics["test/bpd"] < 20
    assert 0 < metrics["test/bpd_se"] < 1
    assert sum(record["costs"][term]["bits_per_dim"] for term in ("reconstruction", "prior", "matching")) == pytest.approx(
        record["costs"]["elbo"]["bits_per_dim"], rel=1e-5
    )
    assert record["weights"] == "ema"
    assert record["protocol"]["levels"] == 17
    assert record["protocol"]["estimator"]
    assert torch.__version__.startswith(record["versions"]["torch"])
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert figure == pytest.approx(min(float(row["val/bpd"]) for row in rows if row["val/bpd"]), rel=1e-5)
    assert {f"{stage}/{term}" for stage in ("train", "val", "test") for term in TERMS} | {"train/loss"} <= set(rows[0])
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["image_shape"] == [1, 8, 8]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    pictures = {path.relative_to(run).as_posix() for path in run.rglob("*.png")}
    expected = {"samples/final.png", "samples/step_0000011.png", "samples/step_0000022.png", "plots/kl_per_level.png"}
    assert pictures == expected | ({"plots/reconstructions.png"} if model != "ddpm" else set())
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


def test_continuous_data_is_reported_in_nats_and_never_in_bits(tmp_path, capsys):
    figure = run_here(
        tmp_path, "model=ddpm", "data=gaussian", "logger=csv", "model.num_steps=2", "trainer.max_epochs=8", "data.std=0.5",
        "data.num_train=2048", "callbacks.pictures.every_n_epochs=0",
    )  # fmt: skip
    record = result(tmp_path / "run")
    assert figure == record["objective"]
    assert not [name for name in record["metrics"] if "bpd" in name]
    assert "bits" not in json.dumps(record["costs"])
    printed = capsys.readouterr().out
    assert "log-density" in printed
    assert "bits/dim" not in printed
    # no bound exceeds what the density itself would score
    entropy = record["protocol"]["image_shape"][1] ** 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.5))
    assert -record["metrics"]["test/elbo"] > entropy - 4 * record["metrics"]["test/elbo_se"]


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
        (["trainer.accelerator=tpu"], "trainer"),
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
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_sentence_before_training(overrides, sentence, tmp_path):
    with pytest.raises(SettingError) as error:
        run_here(tmp_path, f"paths.data_dir={tmp_path}/data", "logger.mode=disabled", *overrides)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert not list(tmp_path.rglob("*.ckpt"))


def test_resuming_continues_the_count_and_gives_what_an_uninterrupted_run_gives(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = ("model=vae", "logger=csv", "model/lr_scheduler=constant")
    run_here(whole, *common, "trainer.max_epochs=4")
    run_here(parts, *common, "trainer.max_epochs=2")
    run_here(parts, *common, "trainer.max_epochs=4", "ckpt=last")
    one, other = result(whole / "run"), result(parts / "run")
    assert one["step"] == other["step"] == 44
    assert other["metrics"]["test/bpd"] == pytest.approx(one["metrics"]["test/bpd"], abs=1e-6)
    with (parts / "run" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["val/bpd"]]
    assert steps == [10, 21, 32, 43]


def test_checkpoints_of_other_models_broken_files_and_occupied_directories_are_refused(tmp_path):
    run_here(tmp_path / "a", "model=vae", "logger=csv", "trainer.max_epochs=1")
    checkpoint = tmp_path / "a" / "run" / "checkpoints" / "last.ckpt"
    with pytest.raises(SettingError, match="another model"):
        run_here(tmp_path / "b", "model=vae", "logger=csv", "model.latent_dim=8", f"ckpt={checkpoint}")
    with pytest.raises(SettingError, match=r"there model\._target_=.*VAELightningModule, here .*MHVAELightningModule"):
        run_here(tmp_path / "b", "model=mhvae", "logger=csv", f"ckpt={checkpoint}")
    with pytest.raises(SettingError, match="already holds a run"):
        run_here(tmp_path / "a", "model=vae", "logger=csv")
    broken = tmp_path / "broken.ckpt"
    held = torch.load(checkpoint, weights_only=True)
    torch.save({name: value for name, value in held.items() if name != "optimizer_states"}, broken)
    with pytest.raises(SettingError, match="has no optimizer_states"):
        run_here(tmp_path / "c", "model=vae", "logger=csv", f"ckpt={broken}")
    for name, other in {
        "loops": {}, "optimizer_states": [], "lr_schedulers": 3, "global_step": "x", "callbacks": 5, "images": 5,
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
    torch.save({"config": os.system}, broken)
    with pytest.raises(SettingError, match="truncated, or was not written"):
        run_here(tmp_path / "c", "model=vae", "logger=csv", f"ckpt={broken}")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(
        SettingError, match=r"last\.ckpt is truncated.*: give another checkpoint, as ckpt=(\S+best\.ckpt)$"
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


def test_early_stopping_and_training_without_averages(tmp_path):
    run_here(
        tmp_path, "model=vae", "logger=csv", "callbacks=early_stopping", "callbacks.early_stopping.patience=1",
        "+callbacks.early_stopping.min_delta=1e6", "~callbacks.ema", "trainer.max_epochs=50",
    )  # fmt: skip
    assert result(tmp_path / "run")["step"] == 22
    assert result(tmp_path / "run")["weights"] == "raw"


@pytest.mark.parametrize(("patience", "steps"), [(0, 22), (1, 22), (2, 33)])
def test_early_stopping_says_that_it_ended_the_run(patience, steps, tmp_path, capsys):
    run_here(
        tmp_path, "model=vae", "logger=csv", "callbacks=early_stopping", f"callbacks.early_stopping.patience={patience}",
        "+callbacks.early_stopping.min_delta=1e6", "trainer.max_epochs=50",
    )  # fmt: skip
    assert result(tmp_path / "run")["step"] == steps
    assert f"stopped early after step {steps}, epoch {steps // 11}: " in capsys.readouterr().out


def test_a_run_says_that_its_time_was_up_and_one_that_ended_as_asked_says_nothing(tmp_path, capsys):
    settings = ("model=vae", "logger=csv", "callbacks.pictures=null", "trainer.check_val_every_n_epoch=1000")
    run_here(tmp_path / "one", *settings, "trainer.max_epochs=-1", "trainer.max_time=00:00:00:01")
    step = result(tmp_path / "one" / "run")["step"]
    assert f"trainer.max_time is up after step {step}, epoch " in capsys.readouterr().out
    run_here(tmp_path / "two", *settings, "trainer.max_time=00:01:00:00")
    assert "after step" not in capsys.readouterr().out


def test_a_run_that_early_stopping_has_ended_is_over_unless_it_is_given_more_patience(tmp_path):
    settings = ("model=vae", "logger=csv", "callbacks=early_stopping", "+callbacks.early_stopping.min_delta=1e6")
    settings += ("callbacks.pictures=null", "trainer.max_epochs=50", "ckpt=auto")
    for patience, steps in ((1, 22), (1, 22), (2, 33), (2, 33)):
        run_here(tmp_path, *settings, f"callbacks.early_stopping.patience={patience}")
        assert result(tmp_path / "run")["step"] == steps


@pytest.mark.parametrize("model", ["vae", "ddpm"])
def test_bf16_moves_the_figure_by_less_than_a_thousandth(model, tmp_path):
    """The same weights, tested in both precisions: a run that is resumed at its end trains no more."""
    run_here(tmp_path / "a", *MODELS[model], "logger=csv")
    checkpoint = tmp_path / "a" / "run" / "checkpoints" / "last.ckpt"
    for name, precision in (("b", "32-true"), ("c", "bf16-mixed")):
        run_here(tmp_path / name, *MODELS[model], "logger=csv", f"ckpt={checkpoint}", f"trainer.precision={precision}")
    figures = [result(tmp_path / name / "run")["metrics"]["test/bpd"] for name in ("b", "c")]
    assert figures[0] != figures[1]
    assert figures[0] == pytest.approx(figures[1], rel=3e-4)  # 1e-3 at 3.3 bits/dim; a barely trained chain reads 12


def test_help_is_quick_and_names_every_group(tmp_path):
    done = command("--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("model: ddpm, mhvae, vae", "model/schedule: constant, cosine, jsd", "data: cifar10, digits", "Examples"):
        assert word in done.stdout
    assert "$" not in done.stdout
    assert not list(tmp_path.iterdir())


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


def test_torchrun_starts_one_run_and_ckpt_auto_goes_on_with_it(tmp_path):
    common = [
        *QUICK[0:1],
        *QUICK[2:],
        *SMALL_DDPM,
        "model.num_steps=20",
        "trainer.devices=2",
        "hydra.run.dir=here",
        "ckpt=auto",
        "logger=csv",
        "model/lr_scheduler=constant",
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    steps = []
    for epochs in (1, 2):
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "train.py"),
             *common, f"trainer.max_epochs={epochs}"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        steps.append(result(tmp_path / "here")["step"])
    assert steps == [11, 22]
    assert result(tmp_path / "here")["devices"] == 2
    assert not list(tmp_path.glob("outputs/*"))


def signalled(number, command_line, tmp_path, beyond=0):
    """Sends a signal once a checkpoint of a later step is there: (exit code, what was printed, the checkpoint's step)."""
    process = begin(*command_line, cwd=tmp_path)
    checkpoint, deadline = tmp_path / "here" / "checkpoints" / "last.ckpt", time.monotonic() + 120

    def step():
        return torch.load(checkpoint, weights_only=True)["global_step"] if checkpoint.exists() else 0

    while step() <= beyond and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, number)
    done = process.finish(timeout=60)
    return done.returncode, done.stdout + done.stderr, step()


def test_a_signal_keeps_the_last_checkpoint_says_how_to_go_on_and_that_works(tmp_path):
    """First Ctrl-C, then SIGTERM, then to the end; with a schedule of one's own."""
    own = tmp_path / "my own" / "model" / "schedule"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("_target_: diffusion.cosine\n_partial_: true\ns: 0.01\n")
    command_line = [
        "--config-dir",
        "my own",
        "model/schedule=mine",
        *QUICK,
        *SMALL_DDPM,
        "logger=csv",
        "callbacks.pictures=null",
        "trainer.max_epochs=100000",
        "hydra.run.dir=here",
        "model/lr_scheduler=constant",
    ]
    step = 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        begun = step
        returned, output, step = signalled(number, command_line, tmp_path, begun)
        assert returned == code
        assert "Traceback" not in output
        assert (f"continuing from {tmp_path}/here/checkpoints/last.ckpt" in output) == (begun > 0)
        (at,) = re.findall(r"interrupted at step (\d+);", output)
        assert int(at) >= step > begun  # more, if it came in a validation
        (said,) = (line for line in output.splitlines() if "ckpt=last" in line)
        command_line = shlex.split(said)[2:]
    command_line[command_line.index("trainer.max_epochs=100000")] = f"trainer.max_epochs={step // 11 + 2}"
    done = command(*command_line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "here")["step"] == (step // 11 + 2) * 11


def test_a_job_that_tries_something_out_leaves_nothing_and_takes_nothing(tmp_path, capsys):
    tries = ("model=vae", "trainer.fast_dev_run=true")
    run_here(tmp_path, *tries)
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("kept")
    run_here(tmp_path, *tries)
    assert (tmp_path / "run" / "notes.txt").read_text() == "kept"
    with pytest.raises(SystemExit) as end:
        run_here(tmp_path / "size", "model=vae", "callbacks=batch_size_finder", "callbacks.batch_size_finder.most=256")
    assert not end.value.code
    assert not list((tmp_path / "size").iterdir())
    assert "run directory" not in capsys.readouterr().out


@pytest.mark.parametrize("profiler", ["simple", "advanced"])
def test_a_profiler_says_what_it_found_in_the_run_directory(profiler, tmp_path, capsys):
    run_here(tmp_path, "model=vae", "logger=csv", "trainer.max_epochs=1", f"trainer.profiler={profiler}")
    assert "optimizer_step" in (tmp_path / "run" / "fit-profile.txt").read_text()
    assert "test_step" in (tmp_path / "run" / "test-profile.txt").read_text()
    assert "optimizer_step" not in capsys.readouterr().out


def test_config_is_checked_against_the_data(tmp_path):
    cfg = configure(tmp_path, "model=vae")
    assert cfg.model.levels == cfg.data.levels == 17


@pytest.mark.parametrize("name", ["plain (1)", "a b/k=é", "it's", "a\\b"])
def test_the_printed_command_goes_on_wherever_the_run_lies(name, tmp_path):
    configure(tmp_path, "model=vae")
    arguments = shlex.split(resume_command(tmp_path / name))[2:]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", arguments, return_hydra_config=True)
    assert cfg.hydra.run.dir == str(tmp_path / name)


def test_a_run_of_one_picture_and_without_loggers_leaves_its_figures(tmp_path):
    run_here(
        tmp_path, "model=vae", "~logger", "callbacks.pictures.num=1", "trainer.max_epochs=1", "trainer.limit_val_batches=0"
    )
    assert result(tmp_path / "run")["objective"] is None  # nothing was validated, and JSON has no NaN
    assert result(tmp_path / "run")["metrics"]["test/bpd"] > 0


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SIGTERMException)])
def test_figures_come_before_pictures_which_a_signal_cuts_short(number, kind, tmp_path, monkeypatch, capsys):
    seen, before = [], signal.getsignal(signal.SIGTERM)

    def draw(self, *_):
        seen.append(result(tmp_path / "run")["metrics"]["test/bpd"])
        signal.raise_signal(number)
        seen.append("went on")

    monkeypatch.setattr(Pictures, "on_test_end", draw)
    with pytest.raises(kind):
        run_here(tmp_path, "model=vae", "logger=csv", "trainer.max_epochs=1")
    output = capsys.readouterr().out
    assert len(seen) == 1
    assert f"{seen[0]:.4f}" in output[: output.index("drawing pictures")]
    assert "interrupted while pictures were drawn; the result stands" in output
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_test_of_some_batches_says_of_how_many_images_it_is(tmp_path, capsys):
    settings = ("model=vae", "logger=csv", "trainer.max_epochs=1", "data.batch_size=64", "callbacks.pictures=null")
    for limits, tested, title in (
        ((), 180, "test set, ema"),
        (("trainer.limit_test_batches=2",), 128, "128 of 180 test images, ema"),
    ):
        run_here(tmp_path / str(tested), *settings, *limits)
        assert result(tmp_path / str(tested) / "run")["protocol"]["num_tested"] == tested
        assert title in capsys.readouterr().out
