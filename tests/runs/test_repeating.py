"""A run's config.yaml on the command line: what makes another run of it, and what follows the settings that are given."""

import json
import re

import pytest
import yaml

from runs.build import flatten
from runs.repeating import FOLLOWS, as_another_run
from tests.jobs import QUICK, ROOT, command, result

CONFIG = {
    "seed": 4,
    "paths": {"output_dir": "outputs", "data_dir": "data"},
    "model": {},
    "data": {"seed": 4, "split_seed": 4, "root": "data/pictures"},
    "trainer": {},
    "logger": {"_target_": "loggers.wandb_logger", "save_dir": "outputs", "name": "vae-image_folder-s4"},
    "callbacks": {"seeding": {"seed": 4}},
}


def added(directory, *arguments, **changed):
    (directory / "config.yaml").write_text(yaml.safe_dump(CONFIG | changed))
    line = ["train.py", "--config-dir", str(directory), "--config-name", "config", *arguments]
    return as_another_run(line)[len(line) :]


@pytest.mark.parametrize(
    ("given", "follows"),
    [
        ("seed=1", {"data.seed=${seed}", "callbacks.seeding.seed=${seed}", "logger.name=vae-image_folder-s${seed}"}),
        ("paths.data_dir=/disk", {"data.root=${paths.data_dir}/pictures"}),
        ("paths.output_dir=out", {"logger.save_dir=${paths.output_dir}"}),
        ("model.beta=2", set()),
    ],
)
def test_what_conf_takes_from_another_setting_follows_it(given, follows, tmp_path):
    items = {item for item in added(tmp_path, given) if not item.startswith("hydra")} - {"ckpt=null"}
    assert items == follows


def test_all_that_conf_takes_from_the_seed_and_the_paths_is_known():
    found = set()
    for group in ("data", "callbacks", "logger", "trainer", "model"):
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            for key, value in flatten(yaml.safe_load(path.read_text()), group):
                found |= {(key, source) for source in re.findall(r"\$\{(seed|paths\.\w+)\}", str(value))}
    assert found - {("logger.name", "seed")} == set(FOLLOWS.items())  # a name follows in words of its own


def test_what_was_set_by_itself_stays(tmp_path):
    own = {"data": {"seed": 9, "root": "database"}, "logger": {"name": "mine", "save_dir": "logs"}, "callbacks": {}}
    items = added(tmp_path, "seed=1", "paths.data_dir=d", "paths.output_dir=o", **own)
    assert not [item for item in items if item.startswith(("data", "logger", "callbacks"))]
    assert not [item for item in added(tmp_path, "seed=1", "data.seed=2", "~callbacks") if item.startswith(("data", "callb"))]


def test_tensorboards_files_are_the_new_runs(tmp_path):
    own = {"_target_": "lightning.pytorch.loggers.TensorBoardLogger", "save_dir": "/runs/first", "name": ""}
    assert "logger.save_dir=${hydra:runtime.output_dir}" in added(tmp_path, logger=own)


def test_what_was_chosen_is_taken_from_the_result(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"choices": {"model": "vae", "model/encoder": "mlp", "experiment": None}}))
    assert "+hydra.runtime.choices={model:vae,model/encoder:mlp,experiment:null}" in added(tmp_path)
    (tmp_path / "result.json").write_text("damaged")
    assert not [item for item in added(tmp_path) if "choices" in item]


def test_a_sweep_of_it_is_a_sweep_as_any_other(tmp_path):
    settings = ("model=vae", "model.latent_dim=3", "logger=csv", "callbacks.pictures.directory=out", *QUICK)
    assert command(*settings, "hydra.run.dir=first", cwd=tmp_path).returncode == 0
    assert command(*settings, "hydra.run.dir=second", "seed=1", cwd=tmp_path).returncode == 0
    line = ("--config-dir", "first", "--config-name", "config", "-m", "seed=1", "model.latent_dim=3,0", "trainer.max_epochs=2")
    swept = command(*line, cwd=tmp_path)
    assert swept.returncode == 1
    assert "sweep: 1 of 2 jobs done, 1 failed" in swept.stdout
    (directory,) = (path.parent for path in tmp_path.glob("outputs/sweeps/latent_dim-*/vae-digits-s1-*/result.json"))
    assert result(directory)["metrics"] == result(tmp_path / "second")["metrics"]
    assert result(directory)["choices"].items() >= {"model": "vae", "data": "digits"}.items()
    assert "skipped" in command(*line, "sweep.retry_failed=false", cwd=tmp_path).stdout


def test_a_choice_where_there_are_settings_alone_is_refused_with_what_it_would_do(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    refused = command("--config-dir", ".", "--config-name", "config", "trainer=ddp_cpu", cwd=tmp_path)
    assert refused.stderr == (
        "error: trainer: the config that was named chooses none, but has settings: change those, as in trainer.NAME=VALUE; "
        "+trainer=ddp_cpu would put all that this choice sets over them\n"
    )
