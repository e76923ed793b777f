"""What a sweep is before it runs: its directory, its jobs and their names, and what is refused."""

import re

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

from hydra_plugins.grid_sweeper import GridSweeper
from runs.identity import identity, job_name, with_choices, with_sweep_directory
from runs.sweep import SweepReport, refused_sweep
from runs.sweep_jobs import SWEEP, not_shared, varied
from tests.jobs import ROOT, command, configure
from tests.runs.sweeps import JOB


def test_identity_is_of_what_figures_depend_on(tmp_path):
    def of(*overrides):
        return identity(configure(tmp_path, "model=vae", *overrides))

    same = [(), ("logger=csv",), (f"paths.output_dir={tmp_path}/elsewhere",), ("callbacks.pictures.num=4",), ("ckpt=last",)]
    other = [
        ("seed=1",),
        ("model.latent_dim=3",),
        ("data.batch_size=64",),
        ("trainer.devices=2",),
        ("callbacks.ema.decay=0.9",),
    ]
    assert len({of(*overrides) for overrides in same}) == 1
    assert of("~callbacks") != of()
    assert len({of(*overrides) for overrides in (*same, *other)}) == 1 + len(other)


def test_the_same_sweep_has_the_same_directory_and_another_has_another():
    def directory(*arguments):
        return [item for item in with_sweep_directory(["train.py", *arguments]) if "sweep.dir" in item]

    base = directory("-m", "seed=0,1", "model/schedule=cosine,linear")
    assert base == directory("--multirun", "model/schedule=cosine,linear", "seed=0,1")
    assert base == directory("-m", "seed=0,1", "model/schedule=cosine,linear", "hydra/launcher=joblib", "sweep.fresh=true")
    assert base == directory("hydra.mode=MULTIRUN", "seed=0,1", "model/schedule=cosine,linear")
    assert base != directory("-m", "seed=0,2", "model/schedule=cosine,linear")
    assert "schedule-seed" in base[0]
    for line in ("seed=0,1 -m", "-m seed=0,1", "--config-dir here -m ~logger seed=0,1", "--config-dir here -m"):
        found = with_sweep_directory(["train.py", *line.split()])
        (place,) = (i for i, item in enumerate(found) if "sweep.dir" in item)
        assert [*found[1:place], *found[place + 1 :]] == sorted(line.split(), key="-m".__ne__)  # first
        assert all("=" in item or item[0] == "~" for item in found[place:] if item != "-m")  # all of them together
    assert directory("seed=0") == []
    assert directory("-m", "seed=0,1", "hydra.sweep.dir=here") == ["hydra.sweep.dir=here"]


def test_jobs_that_ctrl_c_left_without_a_plan_are_counted(tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("runs.sweep.compose", interrupt)
    for name in "ab":  # begun by the same command before
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "checkpoints" / "last.ckpt").touch()
        (tmp_path / name / "job.json").write_text("{}")
    hydra = {"sweeper": {"params": None}, "overrides": {"task": ["seed=0,1,2"]}, "job": {"config_name": "train"}}
    report = SweepReport()
    report.directory, report.planned = tmp_path, []
    with pytest.raises(KeyboardInterrupt):
        report._plan(OmegaConf.create({"hydra": hydra}))
    report.summarise()
    assert capsys.readouterr().out.startswith("sweep: 0 of 3 jobs done, 2 interrupted, 1 not started in")


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (["model=vae,mhvae", "model.latent_dim=8"], ["model=vae,mhvae", "model.latent_dim=choice(8)"]),
        (["model.betas=[1,2]", "-m", "model=vae,ddpm"], ["model.betas=choice([1,2])", "-m", "model=vae,ddpm"]),
        (["data=mnist,digits", "data/binarization=static"], ["data=mnist,digits", "data/binarization=choice(static)"]),
        (["experiment=a,b", "+model.x=y z", "seed=3"], ["experiment=a,b", "+model.x=choice(y z)", "seed=3"]),
        (["model=vae", "model.latent_dim=8", "seed=1,2"], ["model=vae", "model.latent_dim=8", "seed=1,2"]),
        (
            ["model=vae,mhvae", "~model.beta", "trainer.max_epochs=1"],
            ["model=vae,mhvae", "~model.beta", "trainer.max_epochs=1"],
        ),
        (["model=vae,mhvae", "model.beta=[", "-m"], ["model=vae,mhvae", "model.beta=[", "-m"]),
    ],
)
def test_a_setting_of_what_a_sweep_goes_over_waits_for_a_job_that_has_chosen(given, seen):
    assert with_choices(["train.py", *given]) == ["train.py", *seen]


def test_what_has_one_value_names_no_job():
    common = ["model=vae,mhvae", "model.latent_dim=choice(8)", "seed=0"]
    assert not_shared(["model=vae", "model.latent_dim=8", "seed=0"], common) == ["model=vae"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["hydra/sweeper=search", "model.beta=interval(2,1)"], "from a smaller number to a larger one"),
        (["hydra/sweeper=search", "model.beta=tag(log,interval(0,1))"], "in logarithms begins above 0"),
        (["hydra/sweeper=search", "hydra/sweeper/sampler=grid", "model.beta=interval(1,2)"], "another sampler than grid"),
        (["model.beta=interval(1,2)"], "a grid takes values"),
        (["seed=1,2", "hydra.sweep.subdir=foo"], "hydra.sweep.subdir=foo: jobs have names of their own"),
        (["seed=1,2", "hydra.sweeper.max_batch_size=0"], "give an integer of at least 1, or null for all jobs"),
        (["seed=1,2", "sweep.retry_failed=ja"], "sweep.retry_failed=ja: give true or false"),
    ],
)
def test_sweeps_that_cannot_work_are_refused_before_they_begin(overrides, words, tmp_path):
    if "hydra/sweeper=search" in overrides:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    task = [item for item in overrides if not item.startswith("hydra")]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        fixed = [item for item in overrides if not re.search("[,(]", item)]
        config = compose("train", fixed, return_hydra_config=True)
    with open_dict(config):
        config.hydra.overrides.task = task
        config.hydra.overrides.hydra = [item for item in overrides if item not in task]
    assert words in refused_sweep(config)


def test_what_refers_to_a_setting_is_shared_by_the_trials_of_a_search(tmp_path):
    record = {"hydra": {"overrides": {"task": ["model.latent_dim=interval(2,5)", "data.split_seed=${seed}"]}}}
    OmegaConf.save(OmegaConf.create(record), tmp_path / SWEEP)
    assert varied(["model.latent_dim=3", "data.split_seed=0"], tmp_path) == ["model.latent_dim=3"]


@pytest.mark.parametrize("value", ["data.split_seed=${seed}", "callbacks.pictures.directory=${hydra:runtime.output_dir}"])
def test_what_refers_to_a_setting_of_the_sweep_is_planned_as_it_is_run(value, tmp_path, capsys):
    overrides = ["model=vae", "seed=3,4", value]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", ["model=vae"], return_hydra_config=True)
        with open_dict(config):
            config.hydra.job.config_name, config.hydra.sweep.dir = "train", str(tmp_path)
            config.hydra.overrides.task = overrides
        report = SweepReport()
        report.on_multirun_start(config)
        jobs = [job_name(compose("train", ["model=vae", f"seed={seed}", value]), ["seed"]) for seed in (3, 4)]
    assert [path.name for path in report.planned] == jobs


def test_no_batch_of_a_grid_is_empty_as_submitit_takes_no_such_one(monkeypatch):
    report = SweepReport()
    monkeypatch.setattr(SweepReport, "latest", report)
    overrides = OverridesParser.create().parse_overrides(["seed=1,2,3,4,5"])
    report.impossible = {("seed=1",), ("seed=2",)}
    assert GridSweeper.split_arguments(overrides, 2) == [[["seed=3"], ["seed=4"]], [["seed=5"]]]
    report.impossible = {(f"seed={seed}",) for seed in range(1, 6)}
    assert GridSweeper.split_arguments(overrides, 2) == GridSweeper.split_arguments(overrides, None) == []


def test_values_that_are_in_no_identity_are_jobs_of_their_own_where_a_sweep_goes_over_them(tmp_path):
    cfg = configure(tmp_path, "model=vae")
    usual = job_name(cfg, ())
    assert job_name(cfg, ["seed=0", "model/schedule=cosine", "experiment=x", "trainer=ddp", "~callbacks.ema"]) == usual
    beside = ["data.root=a", "data.root=b", "ckpt=a.ckpt", "compile=true", "paths.data_dir=a", "logger=csv", "+data.root=c"]
    assert len({usual, *(job_name(cfg, [item]) for item in beside)}) == 1 + len(beside)
    assert job_name(cfg, ["seed=1", "ckpt=a", "compile=true"]) == job_name(cfg, ["compile=true", "ckpt=a"])


def test_what_a_launcher_refuses_is_said(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    done = command("-m", *JOB, "seed=0,1", "hydra/launcher=cores", "hydra.launcher.n_jobs=0", cwd=tmp_path)
    assert done.returncode == 1
    assert not (tmp_path / "outputs").exists()
    (line,) = done.stderr.splitlines()
    assert re.match("error: .*n_jobs", line)


def test_a_sweep_that_has_no_place_says_so_once(tmp_path):
    (tmp_path / "file").touch()
    done = command("-m", *JOB, "seed=0,1", "hydra.sweep.dir=file/there", cwd=tmp_path)
    assert done.returncode == 1
    sentence = "error: file/there: Not a directory; choose another place by hydra.sweep.dir or paths.output_dir"
    assert done.stderr.splitlines() == [sentence]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.beta=interval(1,2)"], "model.beta=interval(1,2): a grid takes values"),
        (["seed=0,1", "hydra.run.dir=there"], "hydra.run.dir=there is the directory of one run"),
        (["hydra/sweeper=search", "hydra.sweeper.n_trials=2"], "hydra/sweeper=search has nothing to search"),
        (["hydra/sweeper=search", "seed=1,2", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0: give an integer"),
        (["hydra/sweeper=search", "seed=1,2", "hydra.sweeper.direction=up"], "hydra.sweeper.direction=up: choose minimize"),
        (["hydra/launcher=slurm", "seed=1,2"], "hydra/launcher=slurm: this machine has no srun"),
    ],
)
def test_a_sweep_that_would_run_nothing_is_refused_before_it_has_a_directory(overrides, sentence, tmp_path):
    if "hydra/sweeper=search" in overrides:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    if "hydra/launcher=slurm" in overrides:
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    done = command(*overrides[:1], "-m", *overrides[1:], cwd=tmp_path, PATH="/nowhere")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {sentence}")
    assert done.returncode == 1
    assert not (tmp_path / "outputs").exists()
