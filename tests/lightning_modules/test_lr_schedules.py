"""Factors of the learning rate, step by step."""

import math

import pytest

from lightning_modules import Constant, WarmupCosine


@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_are_their_formulas(warmup):
    total, rises = 24, [(step + 1) / (warmup + 1) for step in range(warmup)]
    assert [Constant(warmup)(step, math.inf) for step in range(total)] == pytest.approx(rises + (total - warmup) * [1.0])
    falls = [0.1 + 0.9 * (1 + math.cos(math.pi * k / (total - warmup))) / 2 for k in range(total - warmup + 1)]
    factors = [WarmupCosine(warmup, 0.1)(step, total) for step in range(total + 1)]
    assert factors == pytest.approx(rises + falls)
    assert factors[-1] == pytest.approx(0.1)
    assert WarmupCosine(warmup, 0.1)(3 * total, total) == pytest.approx(0.1)


@pytest.mark.parametrize("settings", [{"warmup_steps": -1}, {"final_fraction": 1.5}, {"final_fraction": -0.1}])
def test_schedules_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=rf"model\.lr_scheduler\.{next(iter(settings))}="):
        WarmupCosine(**settings)
