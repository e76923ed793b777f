"""Every choice of every group composes and builds; nothing in conf/ is read by nobody."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from runs.build import SettingError, factory
from runs.devices import shards_on_cpu
from runs.kinds import wrong_kinds
from tests.jobs import ROOT, configure

CONF = ROOT / "conf"
PAGE = ("callbacks", "logger", "trainer")  # groups on the page of choices beside the model's own
OWNER = {  # the model that a nested group belongs to, and what else its choices need
    "schedule": ["model=ddpm"],
    "network": ["model=ddpm"],
    "parameterization": ["model=ddpm"],
    "variance": ["model=ddpm"],
    "weighting": ["model=ddpm"],
    "timestep_sampler": ["model=ddpm"],
    "sampler": ["model=ddpm"],
    "posterior": ["model=mhvae"],
    "transition": ["model=mhvae"],
}
NEEDS = {
    "model/likelihood=bernoulli": ["data=mnist", "data/binarization=static"],
    "model/likelihood=gaussian": ["data=gaussian"],
    "model/network=unet_cifar10": ["data=cifar10"],
    "model/network=unet_28x28": ["data=mnist"],
    "model/parameterization=lattice": ["data=digits"],
    "data/binarization=static": ["data=mnist"],
    "data/binarization=dynamic": ["data=mnist"],
    "data/binarization=none": ["data=mnist"],
}


def choices():
    for path in sorted(CONF.rglob("*.yaml")):
        group = path.parent.relative_to(CONF).as_posix()
        if (
            not group.startswith("hydra")
            and group not in (".", "experiment", "evaluation", "fabric", "sampler", "wandb")
            and not group.startswith("recipe")
        ):
            yield f"{group}={path.stem}"


def overrides_for(choice):
    nested = choice.split("=")[0].split("/")[-1]
    before = OWNER.get(nested, ["model=vae"]) if choice.startswith("model/") else []
    return [*before, *NEEDS.get(choice, []), choice]


@pytest.mark.parametrize("choice", list(choices()))
def test_every_choice_builds_its_model_and_data(choice, tmp_path):
    cfg = configure(tmp_path, *overrides_for(choice))
    instantiate(cfg.data, _convert_="all")
    instantiate(cfg.model, _convert_="all")
    for part in cfg.callbacks.values():
        instantiate(part, _convert_="all")
    assert bool(cfg.get("logger")) == (choice != "logger=csv")
    if cfg.get("logger"):  # which would begin to write if it were built
        assert callable(get_object(cfg.logger._target_))
        assert list(wrong_kinds(cfg.logger)) == []


@pytest.mark.parametrize("choice", sorted(path.stem for path in (CONF / "trainer").glob("*.yaml")))
def test_every_trainer_is_built_or_says_which_hardware_it_misses(choice, tmp_path):
    lines = (CONF / "trainer" / f"{choice}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    build = factory(configure(tmp_path, "model=vae", f"trainer={choice}").trainer)
    on_gpus, on_cpu = choice in ("gpu", "ddp", "fsdp", "slurm"), choice in ("default", "cpu", "ddp_cpu")
    assert on_gpus != on_cpu
    if on_cpu or (torch.cuda.is_available() and choice != "slurm"):
        build(logger=False)
        return
    with pytest.raises(SettingError, match=r"trainer\.accelerator=gpu: PyTorch finds no GPU on this machine"):
        build(logger=False)
    if choice == "slurm":
        with pytest.raises(SettingError, match=r"not a task of a SLURM job; start it by srun"):
            build(accelerator="cpu", devices=1, logger=False)
    elif choice != "fsdp" or shards_on_cpu():
        build(accelerator="cpu", devices=1, logger=False)


def test_tf32_is_what_the_setting_says(tmp_path):
    for precision in ("high", "highest"):
        factory(configure(tmp_path, "trainer=cpu", f"trainer.float32_matmul_precision={precision}").trainer)(logger=False)
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 == (precision == "high")


@pytest.mark.parametrize("path", sorted((CONF / "evaluation").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_estimator_composes_and_builds(path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", ["run=somewhere", f"evaluation={path.stem}"])
    assert instantiate(cfg.evaluation, _convert_="all").name == path.stem


@pytest.mark.parametrize("path", sorted((CONF / "model" / "sampler").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sampler_of_a_model_is_one_of_sample_py_too(path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("sample", ["run=somewhere", f"sampler={path.stem}"])
    assert cfg.sampler == OmegaConf.load(path)


@pytest.mark.parametrize("model", ["vae", "mhvae", "ddpm"])
@pytest.mark.parametrize("data", sorted(path.stem for path in (CONF / "data").glob("*.yaml")))
def test_every_model_builds_for_every_data_set(model, data, tmp_path):
    extra = ["model/likelihood=gaussian"] if data == "gaussian" and model != "ddpm" else []
    cfg = configure(tmp_path, f"model={model}", f"data={data}", *extra)
    module = instantiate(cfg.model, _convert_="all")
    assert list(module.image_shape) == list(cfg.data.image_shape)
    assert module.levels == cfg.data.levels


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_an_encoder_or_decoder_that_is_chosen_is_the_same_in_every_model(part, tmp_path):
    for path in sorted((CONF / "model" / part).glob("*.yaml")):
        one, other = (configure(tmp_path, f"model={name}", f"model/{part}={path.stem}").model for name in ("vae", "mhvae"))
        assert one[part] == other[part]


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_experiments_compose_and_begin_with_their_command(path, tmp_path):
    header, first = path.read_text().splitlines()[:2]  # Hydra reads the package only from the top
    assert header == "# @package _global_"
    assert first.startswith(f"# python train.py experiment={path.stem}")
    instantiate(configure(tmp_path, f"experiment={path.stem}").model, _convert_="all")


def test_the_command_of_the_mission_composes(tmp_path):
    cfg = configure(tmp_path, "model=ddpm", "data=cifar10", "trainer.devices=4")
    assert cfg.trainer.devices == 4
    parameters = sum(p.numel() for p in instantiate(cfg.model, _convert_="all").network.parameters())
    assert parameters == 35_746_307


@pytest.mark.parametrize("path", sorted((CONF / "wandb").glob("*.yaml")), ids=lambda path: path.stem)
def test_wandb_sweeps_pass_overrides_that_compose(path, tmp_path):
    sweep = yaml.safe_load(path.read_text())
    fixed = [part for part in sweep["command"] if "=" in part]
    assert sweep["command"][-1] == "${args_no_hyphens}"
    for key, values in sweep["parameters"].items():
        for value in values["values"]:
            configure(tmp_path, *fixed, f"{key}={value}")


def test_yaml_loads():
    for path in CONF.rglob("*.yaml"):
        assert isinstance(OmegaConf.to_container(OmegaConf.load(path)) or {}, dict), path
        assert path.name.islower()
    assert Path(CONF / "train.yaml").exists()


def test_the_page_of_choices_has_all_of_them_and_says_which_are_taken(tmp_path):
    page = (ROOT / "docs" / "choices.md").read_text()
    bold, named = set(re.findall(r"\*\*`(\w+)`\*\*", page)), set(re.findall(r"`(\w+)`", page))
    chosen = {"vae": "model=vae", "mhvae": "model=mhvae", "ddpm": "model=ddpm"}
    for folder in sorted({path.parent for path in (CONF / "model").rglob("*.yaml")} | {CONF / name for name in PAGE}):
        group = folder.relative_to(CONF).as_posix()
        assert f"`{group}=`" in page
        assert {path.stem for path in folder.glob("*.yaml")} <= named, group
    for choice in chosen.values():
        configure(tmp_path, choice)
        taken = HydraConfig.get().runtime.choices
        groups = [name for name in taken if name in PAGE or name.startswith("model/")]
        assert {taken[name] for name in groups} <= bold | set(chosen), choice
