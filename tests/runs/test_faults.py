"""Refusals are one sentence; a fault of code is shown with where it happened."""

from pathlib import Path

import pytest
from torch import nn
from torch.utils.data import DataLoader, Dataset

from datamodules.base import DamagedDataError
from diffusion.schedules import scaled_linear
from runs.build import SettingError
from runs.entry import finish, told
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


class Damaged(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise DamagedDataError("pixels.png cannot be read")


def test_a_refusal_that_a_loader_passes_on_from_its_worker_is_none_of_code():
    with pytest.raises(DamagedDataError) as met:
        next(iter(DataLoader(Damaged(), num_workers=1)))
    assert str(met.value) == "pixels.png cannot be read"
    assert not is_fault(met.value)


def test_an_evaluation_that_meets_damaged_images_ends_in_one_sentence():
    def run(cfg):
        raise DamagedDataError("pixels.png cannot be read")

    with pytest.raises(SystemExit) as end:
        finish(run, None)
    assert end.value.code == "error: pixels.png cannot be read"


def test_the_framework_is_what_the_package_says():
    listed = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("packages = "))
    assert sorted(PACKAGES) == sorted(part.strip('"') for part in listed.partition("[")[2].rstrip("]").split(", "))
