"""Refusals are one sentence; a fault of code is shown with where it happened."""

from pathlib import Path

import pytest
from torch import nn

from diffusion.schedules import scaled_linear
from runs.build import SettingError
from runs.entry import told
from runs.faults import PACKAGES, is_fault, is_somebodys
from tests.jobs import ROOT


def refuses():
    raise ValueError("width=0: give more")


def unpacks():
    _, _ = (1, 2, 3)


def reads():
    Path("/no/such/file").read_text()


@pytest.mark.parametrize(
    ("code", "fault", "somebodys"),
    [
        (refuses, False, True),
        (unpacks, True, True),
        (reads, True, True),
        (lambda: nn.Conv2d(3, 4, 3, groups=7), True, True),
        (lambda: scaled_linear(10, -1.0, 0.5), False, False),
    ],
)
def test_what_is_raised_on_purpose_is_told_from_what_goes_wrong(code, fault, somebodys):
    with pytest.raises((ValueError, OSError)) as met:
        code()
    assert (is_fault(met.value), is_somebodys(met.value)) == (fault, somebodys)
    refusal = SettingError("cannot be built")
    refusal.__cause__ = met.value
    text = told(refusal)
    assert text.endswith("error: cannot be built")
    assert ("Traceback" in text and code.__name__ in text) == fault


def test_the_framework_is_what_the_package_says():
    listed = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("packages = "))
    assert sorted(PACKAGES) == sorted(part.strip('"') for part in listed.partition("[")[2].rstrip("]").split(", "))
