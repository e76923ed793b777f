"""Saved runs: what is refused, and that nothing in a file is ever run."""

import os
import random
import sys
from collections import OrderedDict

import pytest
import torch

from evaluation.saved import SavedRun
from runs.build import SettingError
from runs.directory import FORMAT


@pytest.fixture
def content(runs):
    return torch.load(runs["vae"] / "checkpoints" / "last.ckpt", weights_only=True)


def saved(content, directory):
    path = directory / "changed.ckpt"
    torch.save(content, path)
    return str(path)


def refused(call, *words):
    with pytest.raises(SettingError) as error:
        call()
    sentence = str(error.value)
    assert "\n" not in sentence
    assert len(sentence) < 500
    for word in words:
        assert word in sentence


def test_a_run_directory_has_its_best_checkpoint_and_all_its_weights(runs, tmp_path):
    run = runs.copy("vae", tmp_path)
    found = SavedRun.open(str(run))
    assert found.path == run / "checkpoints" / "best.ckpt"
    assert found.directory == run
    assert list(found.weights) == ["ema", "raw"]
    model = found.model()
    loaded = {}
    for name in ("ema", "raw"):
        found.load(model, name)
        loaded[name] = {key: value.clone() for key, value in model.state_dict().items()}
        assert all(torch.equal(value, found.weights[name][key]) for key, value in loaded[name].items())
    assert any(not torch.equal(value, loaded["raw"][key]) for key, value in loaded["ema"].items())
    (run / "checkpoints" / "best.ckpt").unlink()
    assert SavedRun.open(str(run)).path == run / "checkpoints" / "last.ckpt"
    elsewhere = (run / "checkpoints" / "last.ckpt").rename(tmp_path / "mine.ckpt")
    assert SavedRun.open(str(elsewhere)).directory == tmp_path / "mine-evaluation"
    refused(lambda: SavedRun.open(str(run)), "best.ckpt", "last.ckpt")


def test_paths_that_are_no_run_are_refused(tmp_path):
    refused(lambda: SavedRun.open(str(tmp_path / "nowhere")), "nowhere", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(lambda: SavedRun.open(str(tmp_path / "empty")), "empty", "best.ckpt")


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.999])
def test_truncated_files_are_refused(kept, runs, tmp_path):
    whole = (runs["vae"] / "checkpoints" / "last.ckpt").read_bytes()
    path = tmp_path / "part.ckpt"
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    refused(lambda: SavedRun.open(str(path)), "part.ckpt", "truncated")


@pytest.mark.parametrize(
    "other", [b"epoch,loss\n1,2\n", b"\x80\x02}q\x00.", b"PK\x03\x04 no zip at all", random.Random(0).randbytes(1000)]
)
def test_files_of_another_kind_are_refused(other, tmp_path):
    path = tmp_path / "other.ckpt"
    path.write_bytes(other)
    refused(lambda: SavedRun.open(str(path)), "other.ckpt")


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("value", [torch.zeros(3), [1, 2], {"weights": torch.zeros(2)}, None, 5, "text"])
def test_files_that_hold_no_run_are_refused(value, tmp_path):
    refused(lambda: SavedRun.open(saved(value, tmp_path)), "no config in it")


def test_other_formats_and_missing_configs_are_refused(content, tmp_path):
    refused(
        lambda: SavedRun.open(saved(content | {"format": FORMAT + 1}, tmp_path)), f"format {FORMAT + 1}", f"format {FORMAT}"
    )
    nameless = {key: value for key, value in content.items() if key != "format"}
    refused(lambda: SavedRun.open(saved(nameless, tmp_path)), "format none")
    for part in ("config", "state_dict"):
        without = {key: value for key, value in content.items() if key != part}
        refused(lambda without=without: SavedRun.open(saved(without, tmp_path)), "no config in it")
    for config in ({}, {"model": {}}, {"model": "vae", "data": {}}, None, "vae"):
        refused(lambda config=config: SavedRun.open(saved(content | {"config": config}, tmp_path)), "no config in it")


class Calls:
    """Pickles as a call of os.system."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("place", ["config", "state_dict", "optimizer_states"])
def test_pickled_calls_are_refused_and_not_made(place, content, tmp_path):
    marker = tmp_path / "made"
    for value in (Calls(marker), os.system):
        bad = {**content, place: {**content["config"], "more": value}}
        refused(lambda bad=bad: SavedRun.open(saved(bad, tmp_path)), "more than tensors and plain values")
    assert not marker.exists()


def test_a_list_of_code_to_run_is_refused_and_not_run(content, tmp_path, monkeypatch):
    marker, loaded = tmp_path / "made", []
    monkeypatch.setattr("torch.hub.load", lambda *args, **kwargs: loaded.append(args))
    for target, settings in {
        "os.system": {"command": f"touch {marker}"},
        "subprocess.Popen": {"args": ["touch", str(marker)]},
        "builtins.eval": {"_args_": [f"open({str(marker)!r}, 'w')"]},
        "losses.draws.torch.hub.load": {"repo_or_dir": "some/where", "model": "any"},
        "losses.torch.hub.load": {},
        "losses.draws.seeded": {},
        "lightning_modules.base.build": {"module_or_factory": {"_target_": "os.system", "command": f"touch {marker}"}},
        "lightning_modules.torch": {},
        "torch.optim.lr_scheduler": {},
        "torch.optim.os.system": {},
        "hydra.utils.instantiate": {},
        "networks": {},
        "": {},
    }.items():
        node = {"_target_": target, **settings}
        model = content["config"]["model"]
        for config in (
            node,
            model | {"encoder": node},
            model | {"encoder": {**model["encoder"], "deeper": [1, [{"x": node}]]}},
            model | {"encoder": OrderedDict(node)},
            model | {"encoder": [node]},
        ):
            bad = content | {"config": content["config"] | {"model": config}}
            refused(lambda bad=bad: SavedRun.open(saved(bad, tmp_path)).model(), target, "packages=[")
        bad = content | {"config": content["config"] | {"data": node}}
        refused(lambda bad=bad: SavedRun.open(saved(bad, tmp_path)).data(), target)
    assert not marker.exists()
    assert not loaded


called = []


def call(**settings):
    """Neither Hydra nor this framework knows it: only the check of names keeps it from being run."""
    called.append(settings)


@pytest.mark.parametrize("name", ["plain", "tuple", "created", "decoded", "target"])
def test_names_that_hide_from_the_check_are_not_called_either(name, content, tmp_path):
    """Hydra takes tuples for lists, and OmegaConf's resolvers make nodes out of text."""
    target = f"{__name__}.call"
    hidden = {
        "plain": {"_target_": target},
        "tuple": ({"_target_": target},),
        "created": f"${{oc.create:'{{_target_: {target}}}'}}",
        "decoded": f"${{oc.decode:'{{_target_: {target}}}'}}",
        "target": {"_target_": f"${{oc.decode:{target}}}"},
    }[name]
    model = content["config"]["model"]
    called.clear()
    for part in ("encoder", "likelihood"):
        bad = content | {"config": content["config"] | {"model": model | {part: {**model[part], "hidden": hidden}}}}
        with pytest.raises(SettingError):
            SavedRun.open(saved(bad, tmp_path)).model()
    assert not called


def test_weights_that_do_not_fit_are_refused(content, tmp_path):
    state = content["state_dict"]
    key = next(name for name, value in state.items() if value.ndim == 2)
    for changed in (
        {name: value for name, value in state.items() if name != key},
        state | {"more": torch.zeros(1)},
        state | {key: state[key][:1]},
        state | {key: "text"},
        {},
    ):
        run = SavedRun.open(saved(content | {"state_dict": changed}, tmp_path))
        refused(lambda run=run: run.load(run.model(), "ema"), "do not fit")
    for changed in ([1, 2], 5, None):
        path = saved(content | {"state_dict": changed}, tmp_path)
        refused(lambda path=path: SavedRun.open(path), "not written by this framework")
    config = content["config"]
    run = SavedRun.open(saved(content | {"config": config | {"model": config["model"] | {"latent_dim": 3}}}, tmp_path))
    refused(lambda: run.load(run.model(), "raw"), "do not fit")


def test_a_package_of_ones_own_is_let_through_when_it_is_named(content, tmp_path, monkeypatch):
    (tmp_path / "my_networks").mkdir()
    (tmp_path / "my_networks" / "__init__.py").write_text("from networks import MLPEncoder as Encoder\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = content["config"]
    mine = config["model"]["encoder"] | {"_target_": "my_networks.Encoder"}
    path = saved(content | {"config": config | {"model": config["model"] | {"encoder": mine}}}, tmp_path)
    refused(lambda: SavedRun.open(path), "my_networks.Encoder", "packages=[my_networks]")
    refused(lambda: SavedRun.open(path, packages=["my"]), "my_networks.Encoder")
    assert "my_networks" not in sys.modules
    run = SavedRun.open(path, packages=["other", "my_networks"])
    model = run.model()
    run.load(model, "ema")
    assert type(model.encoder).__name__ == "MLPEncoder"
