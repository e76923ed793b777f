"""The parts of one's own that docs/parts.md shows: they are built, trained and evaluated as it says."""

import re
import sys

import pytest
import torch

from runs.build import SettingError
from tests.evaluation.evaluations import evaluate_here
from tests.jobs import ROOT, result, run_here


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes the page's files; returns where its folder of configs is."""
    text = (ROOT / "docs" / "parts.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "mine.py").write_text(code)
    for name, content in re.findall(r"^```yaml\n# (\S+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return f"hydra.searchpath=[file://{tmp_path}/own]"


def test_a_schedule_and_a_network(own, tmp_path):
    run_here(
        tmp_path, own, "model=ddpm", "model/schedule=quadratic", "model/network=convolutions", "model.network.width=8",
        "model.num_steps=20", "logger=csv", "callbacks.pictures=null",
    )  # fmt: skip
    assert result(tmp_path / "run")["choices"]["model/schedule"] == "quadratic"
    assert 1.5 < result(tmp_path / "run")["metrics"]["test/bpd"] < 12
    few = ("replicates=1", "max_images=10", "pictures=false")
    with pytest.raises(SettingError, match=r"names mine\.\w+, .*packages=\[mine\]"):
        evaluate_here(tmp_path / "run", *few)
    assert evaluate_here(tmp_path / "run", "packages=mine", *few)[0] > 1


def test_a_data_set(own, tmp_path):
    run_here(tmp_path, own, "model=vae", "data=stripes", "data.num=400", "logger=csv", "callbacks.pictures=null")
    protocol = result(tmp_path / "run")["protocol"]
    assert (protocol["dataset"], protocol["num_train"], protocol["levels"]) == ("stripes", 320, 2)
    assert 0.1 < result(tmp_path / "run")["metrics"]["test/bpd"] < 1.1  # one bit a pixel, and less when rows are seen


def test_a_model(own, tmp_path):
    run_here(tmp_path, own, "model=learned_prior", "model.latent_dim=3", "logger=csv", "callbacks.pictures=null")
    trained = result(tmp_path / "run")["metrics"]
    assert trained["test/prior"] > 0
    bits, _ = evaluate_here(tmp_path / "run", "packages=mine", "replicates=2", "iwae_samples=2", "max_images=180")
    assert bits == pytest.approx(trained["test/bpd"], abs=0.05)
    weights = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert weights["mean"].abs().min() > 0  # it is trained


def test_the_table_has_every_group_of_parts():
    rows = re.findall(r"^\| `(\S+)` \|", (ROOT / "docs" / "parts.md").read_text(), re.MULTILINE)
    groups = {f"model/{folder.name}" for folder in (ROOT / "conf" / "model").iterdir() if folder.is_dir()}
    assert len(groups) > 10
    assert sorted(rows) == sorted({"data", "model", "callbacks"} | groups)
