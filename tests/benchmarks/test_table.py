"""The table says how many pairs each of its rows rests on, and every part takes as many as it was asked for."""

import json
import sys
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from benchmarks import __main__ as everything
from benchmarks import loops, training
from benchmarks.paired import Pairs, table


def test_a_row_says_how_many_pairs_it_rests_on():
    row = Pairs([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]).row("step", "raw loop", 1.5, True, "{ours} and {theirs} ms")
    assert (row.ratio, row.low, row.high, row.pairs, row.record()["pairs"]) == (1.0, 0.5, 1.5, 3, 3)
    assert table([row])[0].split("|")[4].strip() == "pairs"
    assert table([row])[2] == "| step | raw loop | 1 (0.5 to 1.5) | 3 | ≤ 1.5 | yes | 2,000 and 2,000 ms |"


@pytest.mark.parametrize("part", [partial(loops.exact_sum, checkout="."), loops.outside, training.memory])
def test_slow_parts_take_as_many_pairs_as_the_others(part, monkeypatch):
    monkeypatch.setattr(loops, "in_turns", lambda ours, theirs, rounds: Pairs([1.0] * rounds, [2.0] * rounds))
    monkeypatch.setattr(training.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(stdout="100.0"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "improved_diffusion", MagicMock())
    assert {row.pairs for row in part(9)} == {9}


def test_a_path_without_the_peer_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / "elsewhere", tmp_path / "out"
    command = ["benchmarks", "--only", "pipeline", "exact-sum", "--improved-diffusion", str(folder), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match=rf"{folder} has no improved_diffusion/unet.py.*checkout of https://") as error:
        everything.main()
    assert isinstance(error.value.code, str)  # Python prints it, and exits with 1
    assert capsys.readouterr().out == ""
    assert not out.exists()


def test_the_table_is_written_with_date_versions_and_hardware(tmp_path, monkeypatch):
    row = Pairs([1.0], [2.0]).row("step", "raw loop", 1.5, True, "{ours} and {theirs} ms")
    monkeypatch.setattr(everything, "benches", lambda checkout: {"one": lambda rounds: [row]})
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--out", str(tmp_path)])
    everything.main()
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert list(record) == ["date", "machine", "rounds", "rows", "left_out"]
    assert set(record["machine"]) == {"processor", "cores", "threads", "versions"}
    assert {"python", "torch", "lightning"} <= set(record["machine"]["versions"])
    assert "| step | raw loop |" in next(tmp_path.glob("*.md")).read_text()


def test_where_nothing_could_be_measured_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "exact-sum", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="nothing was measured"):
        everything.main()
    assert not list(tmp_path.iterdir())
