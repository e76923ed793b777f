"""One process: what is compiled, accumulated, refused, and how large a batch may be."""

import csv
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy

from lightning_modules import VAELightningModule, WarmupCosine
from lightning_modules.sharding import blocks, networks
from runs import devices
from runs.build import SettingError, build_part
from runs.devices import StaticGraphDDP, check_processes, compile_networks, make_trainer
from runs.settings import check_ranks
from tests.evaluation.evaluations import evaluate_here
from tests.jobs import configure, result, run_here

VAE = ("model=vae", "model.encoder.hidden_dim=16", "model.decoder.hidden_dim=16", "model.encoder.dropout=0.2", "logger=csv")
SMALL = (*VAE, "callbacks.pictures=null", "model/lr_scheduler=constant")


def checkpoint(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def column(run, name):
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def test_a_compiled_run_is_the_run_and_either_goes_on_from_the_other(tmp_path):
    """Averages and a smaller last batch included; ``eager`` traces and guards as every backend does, and compiles nothing."""
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    run_here(plain, *SMALL, "trainer.max_epochs=1")
    run_here(compiled, *SMALL, "trainer.max_epochs=1", "compile=eager")
    there, here = checkpoint(plain / "run"), checkpoint(compiled / "run")
    for name in ("state_dict", "current_model_state"):
        assert list(there[name]) == list(here[name])
        assert not [key for key in here[name] if "_orig_mod" in key]
        torch.testing.assert_close(here[name], there[name])
    assert there["config"] == here["config"]
    run_here(plain, *SMALL, "ckpt=last", "compile=eager")
    run_here(compiled, *SMALL, "ckpt=last")
    assert column(plain / "run", "val/bpd") == pytest.approx(column(compiled / "run", "val/bpd"), rel=1e-6)
    assert len(column(plain / "run", "val/bpd")) == 2


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=vae", "model.encoder.dropout=0.2"),
        ("model=vae", "data=mnist", "model/encoder=conv", "model/decoder=conv"),
        ("model=mhvae", "model/posterior=markov"),
        ("model=ddpm", "model.network.dropout=0.2"),
        ("model=ddpm", "model/network=unet_8x8", "model.network.base_channels=8"),
        ("model=ddpm", "model/network=unet_8x8", "model.network.base_channels=8", "model.network.checkpoint_activations=true"),
    ],
    ids=lambda overrides: "-".join(item.split("=")[-1] for item in overrides),
)
def test_networks_compile_into_whole_graphs(overrides, tmp_path):
    torch._dynamo.reset()
    model = build_part(configure(tmp_path, *overrides).model)
    for network in networks(model):
        if "posterior" not in type(network).__name__.lower():  # it walks over networks that are given to it
            network.compile(backend="eager", fullgraph=True)
    loss, _ = model.objective(torch.randint(model.levels, (6, *model.image_shape)).to(torch.uint8))
    loss.backward()


def test_networks_and_their_blocks_are_found_by_their_form(tmp_path):
    model = build_part(configure(tmp_path, "model=mhvae", "model/posterior=markov", "model.depth=3").model)
    found = list(networks(model))
    assert {model.decoder, model.posterior, *model.generative} == set(found)
    unet = build_part(configure(tmp_path, "model=ddpm", "model/network=unet_8x8").model).network
    assert {type(block).__name__ for block in blocks(unet)} == {"Block"}
    assert len(list(blocks(unet))) == 4 + 2 + 6


def test_a_backend_that_is_not_there_is_refused(tmp_path):
    model = build_part(configure(tmp_path, *VAE).model)
    with pytest.raises(SettingError, match=r"compile=fast: choose true, false or a backend of torch\.compile: .*inductor"):
        compile_networks(model, "fast")


UNET = (
    "model=ddpm", "model.num_steps=6", "model/network=unet_8x8", "model.network.base_channels=8", "model.network.dropout=0.5",
    "model.network.channel_multipliers=[1]", "model.network.num_res_blocks=1", "model.network.attention_resolutions=[]",
)  # fmt: skip


def test_checkpointed_blocks_drop_the_same_again_when_compiled_or_the_backend_is_refused(tmp_path):
    gradients, x = [], torch.randint(17, (8, 1, 8, 8), dtype=torch.uint8)
    for backend in (False, "aot_eager"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = build_part(configure(tmp_path, *UNET, "model.network.checkpoint_activations=true").model)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.1)  # a branch of zeros has no gradient to get wrong
        compile_networks(model, backend)
        model.objective(x)[0].backward()
        gradients.append([weight.grad for weight in model.parameters()])
    torch.testing.assert_close(*gradients)
    for backend in ("eager", "eager_noexcept", "eager_debug"):
        with pytest.raises(SettingError, match=rf"compile={backend} .* gradients would be wrong: choose compile=aot_eager"):
            compile_networks(model, backend)
    compile_networks(build_part(configure(tmp_path, *UNET).model), "eager")


def test_what_a_gpu_lacks_is_said_before_training(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "An older GPU")
    with pytest.raises(SettingError, match=r"bf16-mixed: An older GPU has no bfloat16; add trainer\.precision=32-true"):
        make_trainer(accelerator="gpu", precision="bf16-mixed", logger=False)
    with pytest.raises(SettingError, match="float32_matmul_precision=tf32: choose highest, high"):
        make_trainer("tf32", accelerator="cpu", logger=False)


@pytest.mark.parametrize(
    "model",
    [VAE, ("model=mhvae", "logger=csv"), ("model=ddpm", "model.num_steps=6", "model.network.hidden_dim=16", "logger=csv")],
)
def test_a_run_in_double_precision_trains_is_tested_and_draws(model, tmp_path):
    run_here(tmp_path, *model, "trainer.precision=64-true", "trainer.max_epochs=1")
    assert (tmp_path / "run" / "samples" / "final.png").exists()
    weights = checkpoint(tmp_path / "run")["state_dict"].values()
    assert {value.dtype for value in weights if value.is_floating_point() and value.ndim > 1} == {torch.float64}


@pytest.mark.parametrize("accelerator", [CPUAccelerator, CUDAAccelerator])
def test_batches_for_a_gpu_are_pinned(accelerator, tmp_path):
    data = build_part(configure(tmp_path, *VAE).data)
    data.setup()
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, accelerator=accelerator(), training=False)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [loader.pin_memory for loader in loaders] == [accelerator is CUDAAccelerator] * 3


def test_float16_with_a_fused_optimiser_is_refused_and_bfloat16_trains(tmp_path):
    with pytest.raises(SettingError, match="choose bf16-mixed"):
        run_here(tmp_path, *SMALL, "trainer.precision=16-mixed")
    run_here(tmp_path, *SMALL, "trainer.precision=bf16-mixed", "trainer.gradient_clip_val=0.5", "trainer.max_epochs=1")
    assert result(tmp_path / "run")["step"] == 11


def test_accumulated_batches_make_one_optimiser_step(tmp_path):
    """Steps, the learning rate's schedule, averages count optimiser steps; images are counted as they are seen."""
    run_here(
        tmp_path, *SMALL, "data.batch_size=32", "trainer.accumulate_grad_batches=4", "model/lr_scheduler=warmup_cosine",
        "model.lr_scheduler.warmup_steps=4", "trainer.log_every_n_steps=1",
    )  # fmt: skip
    record, saved = result(tmp_path / "run"), checkpoint(tmp_path / "run")
    steps = 2 * 11  # 44 batches an epoch
    assert record["step"] == saved["global_step"] == steps
    assert record["images_seen"] == 2 * 44 * 32
    assert saved["averaging_state"]["n_averaged"] == steps
    assert saved["lr_schedulers"][0]["last_epoch"] == steps
    rates = column(tmp_path / "run", "train/lr")
    factors = [WarmupCosine(4)(step, steps) for step in range(steps)]
    assert [rate / max(rates) for rate in rates] == pytest.approx([factor / max(factors) for factor in factors], rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.batch_size=15"], "data.batch_size=15 .* cannot be shared equally by trainer.devices=2"),
        (["trainer.devices=181", "data.batch_size=181"], "the 180 val images of digits are fewer than 181 devices"),
        (["trainer.limit_val_batches=0.5"], "trainer.limit_val_batches=0.5"),
        (["callbacks=batch_size_finder"], "tries one device, not trainer.devices=2"),
        (["trainer.strategy.process_group_backend=cpu:glue"], "process_group_backend=cpu:glue: this PyTorch has no glue"),
    ],
)
def test_what_several_devices_cannot_share_is_refused_before_any_begins(overrides, sentence, tmp_path):
    with pytest.raises(SettingError, match=sentence):
        run_here(tmp_path, *SMALL, "logger=wandb", "logger.mode=offline", "trainer=ddp_cpu", "trainer.devices=2", *overrides)
    assert not list(tmp_path.rglob("*.wandb"))
    run_here(tmp_path, *SMALL, "trainer.max_epochs=1")  # in the same place: nothing was claimed


def test_statistics_of_one_devices_rows_are_refused_on_several(tmp_path):
    cfg = configure(tmp_path, *SMALL)
    model = build_part(cfg.model)
    several = SimpleNamespace(num_devices=2, num_nodes=1, world_size=2, strategy=None, callbacks=[])
    datamodule = SimpleNamespace(check_ranks=lambda ranks: None)
    model.encoder.norm = torch.nn.SyncBatchNorm(3)
    check_ranks(several, model, datamodule, cfg)
    model.encoder.norm = torch.nn.BatchNorm1d(3)
    with pytest.raises(SettingError, match=r"encoder\.norm is a BatchNorm1d, .* with trainer\.devices=2 this would"):
        check_ranks(several, model, datamodule, cfg)
    check_ranks(SimpleNamespace(**{**vars(several), "num_devices": 1, "world_size": 1}), model, datamodule, cfg)


def test_each_fit_learns_the_graph_of_its_own_wrapper(monkeypatch):
    monkeypatch.setattr(DDPStrategy, "configure_ddp", lambda self: None)
    strategy = StaticGraphDDP()
    monkeypatch.setattr(DDPStrategy, "block_backward_sync", lambda self: "blocked")
    for _ in range(2):
        strategy.configure_ddp()
        assert strategy.block_backward_sync() != "blocked"
        assert strategy.block_backward_sync() == "blocked"


def test_what_only_tries_leaves_no_run(tmp_path):
    wandb = ("logger=wandb", "logger.mode=offline")
    run_here(tmp_path, *SMALL, *wandb, "+trainer.fast_dev_run=2")
    assert not (tmp_path / "run" / "result.json").exists()
    with pytest.raises(SystemExit):
        run_here(tmp_path, *VAE, *wandb, "callbacks=batch_size_finder")
    assert not list(tmp_path.rglob("*.wandb"))
    run_here(tmp_path, *SMALL, "trainer.max_epochs=1")
    assert (tmp_path / "run" / "result.json").exists()


def test_the_batch_size_finder_prints_what_fits_and_trains_nothing(tmp_path, capsys, monkeypatch):
    cfg = ("callbacks=batch_size_finder", *VAE)
    with pytest.raises(SystemExit) as end:
        run_here(tmp_path / "a", *cfg)
    assert not end.value.code
    assert "data.batch_size=1024 fits: the training set is not much larger" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.ckpt"))
    whole = torch.Tensor.backward

    def backward(loss, *arguments, **settings):
        if loss.grad_fn is not None and backward.size > 64:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        whole(loss, *arguments, **settings)

    objective = VAELightningModule.objective

    def sized(self, x):
        backward.size = len(x)
        return objective(self, x)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(VAELightningModule, "objective", sized)
    with pytest.raises(SystemExit):
        run_here(tmp_path / "b", *cfg)
    assert "data.batch_size=64 fits: the memory does not hold 128" in capsys.readouterr().out


BEGUN = {
    "torchrun": {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"},
    "srun": {
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "localhost", "SLURM_JOB_ID": "4711",
    },
}  # fmt: skip


@pytest.mark.parametrize("starter", list(BEGUN))
def test_more_processes_than_devices_would_be_runs_of_their_own_and_are_refused(starter, runs, tmp_path, monkeypatch):
    trained = runs["vae"]
    for name, value in (BEGUN[starter] | {"LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    advice = f"but {starter} began 2 processes, one for each device: give"
    with pytest.raises(SettingError, match=rf"trainer\.devices=1 .*{advice} trainer\.devices=2"):
        run_here(tmp_path, *SMALL)
    assert not (tmp_path / "run").exists()
    with pytest.raises(SettingError, match=rf"fabric\.devices=1 .*{advice} fabric\.devices=2"):
        evaluate_here(trained)


def test_tasks_that_lightning_does_not_count_are_refused_in_its_words(tmp_path, monkeypatch):
    for name, value in BEGUN["srun"].items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(SettingError, match="trainer: You set `--ntasks=2`"):
        run_here(tmp_path, *SMALL)


def test_an_interactive_allocation_is_one_process(tmp_path, monkeypatch):
    for name, value in {**BEGUN["srun"], "SLURM_JOB_NAME": "interactive"}.items():
        monkeypatch.setenv(name, value)
    check_processes("trainer", 1, 1)


@pytest.mark.parametrize("precision", ["16-mixed", "64-true"])
def test_a_precision_that_shards_do_not_have_is_refused_with_those_that_they_have(precision, tmp_path):
    with pytest.raises(SettingError, match=rf"trainer\.precision={precision}: .* train in 32-true or bf16-mixed"):
        run_here(
            tmp_path, *SMALL, "trainer=fsdp", "trainer.accelerator=cpu", f"trainer.precision={precision}",
            "model.optimizer.fused=false",
        )  # fmt: skip


def test_a_pytorch_that_shards_on_gpus_only_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "shards_on_cpu", lambda: False)
    with pytest.raises(SettingError, match=r"trainer\.accelerator=cpu: PyTorch .* shards on GPUs only; choose trainer=ddp_cpu"):
        run_here(tmp_path, *SMALL, "trainer=fsdp", "trainer.accelerator=cpu", "trainer.precision=32-true")
