"""The table says how many pairs each of its rows rests on, and every part takes as many as it was asked for."""

import sys
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

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
