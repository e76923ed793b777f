"""Every script leaves its raw figures, with what they were measured on, where its page goes or where it is told to."""

import json
import sys

import pytest

from benchmarks import estimators, likelihood, record, streaming


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a script's main with --out, and returns what it wrote as JSON."""

    def main(module, *arguments):
        name = module.__name__.split(".")[-1]
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--out", str(tmp_path)])
        module.main()
        written = json.loads((tmp_path / f"{name}.json").read_text())
        assert list(written)[:2] == ["date", "machine"]
        assert written["machine"]["versions"]["torch"]
        return written

    return main


def test_streaming(run, monkeypatch):
    monkeypatch.setattr(streaming, "images_per_second", lambda *args, **kwargs: 1000.0)
    monkeypatch.setattr(streaming.torch, "set_num_threads", lambda threads: None)
    written = run(streaming, "--images", "3000")
    assert (written["images"], written["passes"], len(written["rows"])) == (3000, 9, 10)
    assert written["rows"][0] == {"data": "resident", "from": "memory", "flip": False, "images_per_second": 1000.0}


def test_likelihood(run, monkeypatch, tmp_path):
    cost = likelihood.Cost("loop", 1000, 2.0, 0.1, 0.01)
    monkeypatch.setattr(likelihood, "trained_digits", lambda *args, **kwargs: None)
    monkeypatch.setattr(likelihood, "study", lambda *args: ([cost], likelihood.Preparation(2048, 0.25, 180)))
    models = run(likelihood, "--steps", "1")["models"]
    assert [model["estimators"][0]["seconds"] for model in models.values()] == [0.01, 0.01]
    assert [model["preparation"]["calls"] for model in models.values()] == [2048, 2048]
    assert "2,048 network calls, 11.4 for each" in " ".join((tmp_path / "likelihood.md").read_text().split())


def test_estimators(run, monkeypatch, tmp_path):
    two, three = estimators.Noise(-1.0, 0.1, 2.0, 3.0), estimators.Noise(-1.0, 0.1, 4.0, 9.0)
    cells = {2: {"two": two, "three": three, "exact": -1.0}, 5: {"two": two, "three": three, "exact": -1.0}}
    monkeypatch.setattr(estimators, "study", lambda batches: {"linear-Gaussian": cells, "digits": cells})
    written = run(estimators)
    assert written["linear-Gaussian"]["5"]["three"]["gradient"] == 9.0
    assert written["digits"]["2"]["exact"] == -1.0
    assert (tmp_path / "images" / "estimators.png").exists()


def test_by_default_the_page_is_among_the_pages_and_the_figures_among_the_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record.write_page("some", None, "# Some\n", {"rounds": 9})
    assert (tmp_path / "docs" / "some.md").read_text() == "# Some\n"
    assert json.loads((tmp_path / "benchmarks" / "results" / "some.json").read_text())["rounds"] == 9
