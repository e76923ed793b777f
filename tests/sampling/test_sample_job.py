"""Drawings of small trained runs: what they leave, and that the images are the model's own, on however many ranks."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.fabric import Fabric

import sampling.job
from diffusion import ancestral, ddim
from evaluation.saved import SavedRun
from runs.build import SettingError
from sampling import draw
from tests.jobs import ROOT, command, run_here

ALONE = Fabric(accelerator="cpu", devices=1)


def sample_here(run, *overrides):
    """Draws in this process: (path of the images, whether it was interrupted)."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("sample", [f"run={run}", "fabric.accelerator=cpu", *overrides])
    return sampling.job.run(cfg)


def images_of(run, *overrides):
    return np.load(sample_here(run, *overrides)[0])["arr_0"]


def load(run):
    saved = SavedRun.open(str(run))
    model = saved.model()
    saved.load(model, saved.choose(None)[0])
    return model.eval()


@pytest.mark.parametrize("name", ["vae", "mhvae", "ddpm"])
def test_a_drawing_leaves_all_its_images_a_picture_and_how_they_came_to_be(name, runs, tmp_path, capsys):
    run = runs.copy(name, tmp_path)
    path, interrupted = sample_here(run, "num=70", "batch_size=32", "seed=3")
    assert path == run / "samples" / "drawn-1.npz"
    assert not interrupted
    images = np.load(path)["arr_0"]
    assert (images.shape, images.dtype) == ((70, 8, 8, 1), np.uint8)
    assert images.max() <= 16
    assert len({image.tobytes() for image in images}) == 70  # no batch is another's again
    record = json.loads(path.with_suffix(".json").read_text())
    assert (record["num"], record["weights"], record["mean"], record["levels"]) == (70, "ema", True, 17)
    assert record["settings"]["seed"] == 3
    assert record["step"] == torch.load(run / "checkpoints/best.ckpt", weights_only=True)["global_step"]
    assert record.get("network_calls_per_image") == (30 if name == "ddpm" else None)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "70 images, ema weights" in capsys.readouterr().out
    own, _ = draw(load(run), 70, 32, 3, True, ALONE)
    assert np.array_equal(images, own.permute(0, 2, 3, 1).numpy())


def test_an_earlier_drawing_is_kept(runs, tmp_path):
    run = runs.copy("vae", tmp_path)
    first = images_of(run)
    again = images_of(run)
    other = images_of(run, "seed=1")
    assert {path.name for path in (run / "samples").glob("*.npz")} == {f"drawn-{i}.npz" for i in (1, 2, 3)}
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(np.load(run / "samples" / "drawn-1.npz")["arr_0"], first)


def test_weights_and_draws_are_chosen(runs, tmp_path):
    run = runs.copy("vae", tmp_path)
    usual = images_of(run)
    assert not np.array_equal(usual, images_of(run, "weights=raw"))
    assert not np.array_equal(usual, images_of(run, "mean=false"))


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_images_do_not_depend_on_how_many_ranks_draw_them(ranks, runs):
    model = load(runs["ddpm"])
    whole, _ = draw(model, 21, 5, 0, True, ALONE)

    def of_rank(rank):
        fabric = SimpleNamespace(
            global_rank=rank, world_size=ranks, device=torch.device("cpu"), autocast=ALONE.autocast,
            all_reduce=lambda images, reduce_op: images,
        )  # fmt: skip
        return draw(model, 21, 5, 0, True, fabric)[0]

    parts = torch.stack([of_rank(rank) for rank in range(ranks)])
    assert ((parts.flatten(2) > 0).any(2).sum(0) == 1).all()  # each image on one rank
    assert torch.equal(parts.sum(0), whole)


def test_two_processes_draw_what_one_draws(runs, tmp_path):
    run = runs.copy("vae", tmp_path)
    settings = (f"run={run}", "num=21", "batch_size=5", "fabric.accelerator=cpu")
    done = command(*settings, "fabric.devices=2", cwd=tmp_path, script="sample.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("drawn-1.npz") == 1
    assert {path.suffix for path in (run / "samples").glob("drawn-*")} == {".npz", ".png", ".json"}
    assert json.loads((run / "samples" / "drawn-1.json").read_text())["devices"] == 2
    assert np.array_equal(np.load(run / "samples" / "drawn-1.npz")["arr_0"], images_of(run, *settings[1:]))


@pytest.mark.parametrize(
    ("settings", "sampler"),
    [
        ((), lambda process: ancestral(process)),
        (("sampler=ancestral",), lambda process: ancestral(process)),
        (("sampler=ddim", "sampler.num_steps=7"), lambda process: ddim(process, 7)),
        (("sampler=ddim", "sampler.num_steps=4", "sampler.eta=0.5"), lambda process: ddim(process, 4, 0.5)),
    ],
)
def test_a_ddpm_is_walked_by_the_sampler_that_is_chosen(settings, sampler, runs, tmp_path):
    run = runs.copy("ddpm", tmp_path)
    model = load(run)
    model.sampler = sampler
    counted = []
    model.network.register_forward_hook(lambda *_: counted.append(1))
    own, _ = draw(model, 6, 6, 0, True, ALONE)
    path, _ = sample_here(run, "num=6", "batch_size=6", *settings)
    assert np.array_equal(np.load(path)["arr_0"], own.permute(0, 2, 3, 1).numpy())
    assert json.loads(path.with_suffix(".json").read_text())["network_calls_per_image"] == len(counted)


def test_continuous_data_is_drawn_and_kept_as_it_is(tmp_path):
    run_here(tmp_path, "model=vae", "data=gaussian", "model/likelihood=gaussian", "logger=csv", "callbacks.pictures=null")
    path, _ = sample_here(tmp_path / "run", "num=300")
    values = np.load(path)["arr_0"]
    assert values.dtype == np.float32
    assert len(np.unique(values)) > 0.99 * values.size
    assert not json.loads(path.with_suffix(".json").read_text())["mean"]
    path.unlink()  # its number stays taken by what lies beside it
    path, _ = sample_here(tmp_path / "run", "num=3", "fabric.precision=64-true")
    assert path.name == "drawn-2.npz"
    assert np.load(path)["arr_0"].dtype == np.float64
    assert path.with_suffix(".png").is_file()


@pytest.mark.parametrize("batches", [0, 2])
def test_ctrl_c_keeps_the_batches_that_are_whole(batches, runs, tmp_path, monkeypatch):
    run = runs.copy("vae", tmp_path)
    whole = images_of(run, "num=30", "batch_size=10")
    kind, calls = type(load(run)), []

    def sample(self, num, mean=False, usual=kind.sample):
        if len(calls) == batches:
            raise KeyboardInterrupt
        calls.append(num)
        return usual(self, num, mean)

    monkeypatch.setattr(kind, "sample", sample)
    if not batches:
        with pytest.raises(SettingError, match="interrupted before a batch of images was drawn"):
            sample_here(run, "num=30", "batch_size=10")
        assert not list((run / "samples").glob("drawn-2.*"))
        return
    path, interrupted = sample_here(run, "num=30", "batch_size=10")
    assert interrupted
    assert np.array_equal(np.load(path)["arr_0"], whole[:20])
    record = json.loads(path.with_suffix(".json").read_text())
    assert (record["interrupted"], record["num"]) == (True, 20)


@pytest.mark.parametrize(
    ("name", "overrides", "sentence"),
    [
        ("vae", ["num=0"], "num=0: give an integer of at least 1"),
        ("vae", ["num=2.5"], "num=2.5"),
        ("vae", ["num=null"], "num=None"),
        ("vae", ["num=99999999999999"], "num=99999999999999: memory does not hold"),
        ("vae", ["batch_size=0"], "batch_size=0"),
        ("vae", ["seed=-1"], "seed=-1"),
        ("vae", ["mean=maybe"], "mean=maybe: give true or false"),
        ("vae", ["weights=both"], "weights=both: this checkpoint has ema and raw weights; choose one of them"),
        ("vae", ["weights=nope"], "weights=nope"),
        ("vae", ["weights=0"], "weights=0"),
        ("vae", ["sampler=ddim"], "sampler=ddim is for DDPM, but this run is a VAELightningModule"),
        ("ddpm", ["sampler=ddim", "sampler.num_steps=1"], r"^sampler\.num_steps=1 must be"),
        ("ddpm", ["sampler=ddim", "sampler.eta=2"], r"^sampler\.eta=2 must lie"),
        ("ddpm", ["sampler=ddim", "sampler.num_steps=many"], r"^sampler\.num_steps=many: give an integer"),
        ("ddpm", ["+sampler.num_steps=4"], "choose one too, as in sampler=ddim"),
        ("vae", ["fabric.precision=half"], "precision"),
        ("vae", ["run=nowhere"], "run=nowhere does not exist"),
        ("vae", ["run=???"], "run= is missing"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_sentence(name, overrides, sentence, runs):
    with pytest.raises(SettingError, match=sentence) as refusal:
        sample_here(runs[name], *overrides)
    assert "\n" not in str(refusal.value)
    assert not list(runs[name].glob("samples/drawn-*"))


def test_a_setting_of_a_sampler_alone_is_answered_by_the_choice_that_has_it(tmp_path):
    done = command("run=anything", "sampler.num_steps=4", cwd=tmp_path, script="sample.py")
    refusal = "error: sampler.num_steps is a setting of sampler=ddim, not of what is chosen: add sampler=ddim"
    assert (done.returncode, done.stderr.strip()) == (1, refusal)


def test_images_are_drawn_in_the_precision_that_is_asked_for(runs, tmp_path):
    run = runs.copy("vae", tmp_path)
    exact, rough = (images_of(run, "num=64", f"fabric.precision={one}").astype(int) for one in ("32-true", "bf16-mixed"))
    assert 0 < np.abs(exact - rough).mean() < 0.5
