"""Refusals are one sentence; a fault of code is shown with where it happened."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from torch import nn
from torch.utils.data import DataLoader, Dataset

from datamodules.base import DamagedDataError
from diffusion.schedules import scaled_linear
from runs.build import SettingError
from runs.entry import finish, told
from runs.faults import PACKAGES, is_fault, is_somebodys
from runs.lifelines import end_in_peace
from runs.speech import one_sentence, quiet_libraries
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


@pytest.mark.parametrize(
    ("gloo", "said"),
    [
        ("[pair.cc:561] Connection closed by peer [127.0.0.1]:41097. This is typically ...", "rank 1 has lost another"),
        ("[unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation to complete", "rank 1 has waited in vain"),
        ("Timed out after 1801 seconds waiting for clients. 1/2 clients joined.", "rank 1 has waited in vain"),
    ],
)
def test_a_rank_that_others_leave_alone_ends_in_one_sentence(gloo, said, monkeypatch):
    def run(cfg):
        raise RuntimeError(gloo)

    monkeypatch.setattr("runs.entry._rank_of_several", lambda: 1)
    with pytest.raises(SystemExit) as end:
        finish(run, None)
    assert end.value.code.startswith(f"error: {said}")
    with pytest.raises(SettingError, match=said), one_sentence(SimpleNamespace(world_size=2, global_rank=1)):
        run(None)
    monkeypatch.setattr("runs.entry._rank_of_several", lambda: None)  # alone, nobody can have left it
    with pytest.raises(RuntimeError):
        finish(run, None)


@pytest.mark.parametrize(("rank", "code"), [("0", 130), ("1", 0)])
def test_a_later_rank_that_ctrl_c_reached_has_lightning_leave_the_one_alone_that_writes(rank, code, monkeypatch):
    """Lightning kills the first rank within five seconds of the end of one that it began, by its code."""
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit) as end:
        finish(lambda cfg: (None, True), None)
    assert end.value.code == code


@pytest.mark.parametrize(("code", "said"), [(-9, "rank 2 was ended by SIGKILL"), (1, "rank 2 ended with code 1")])
def test_what_lightning_kills_this_rank_for_is_said_before(code, said, monkeypatch, capsys):
    began = [SimpleNamespace(pid=100 + rank, returncode=ended, poll=lambda: None) for rank, ended in enumerate((None, code))]
    observer = _ChildProcessObserver(main_pid=1, child_processes=began)
    monkeypatch.setattr(observer, "_terminate_all", lambda: None)
    quiet_libraries()
    assert observer._run()
    assert capsys.readouterr().err == f"error: {said}, and with it the others\n"


def test_a_rank_whose_job_is_over_is_not_killed_for_the_end_of_others(monkeypatch):
    began = [SimpleNamespace(pid=1, returncode=None, poll=lambda: None)]
    observer = _ChildProcessObserver(main_pid=1, child_processes=began, sleep_period=1)
    monkeypatch.setattr(observer, "_terminate_all", lambda: pytest.fail("it is killed"))
    observer.start()
    end_in_peace()
    began[0].returncode = -9
    assert observer._run()
    observer.join(10)


def test_the_framework_is_what_the_package_says():
    listed = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("packages = "))
    assert sorted(PACKAGES) == sorted(part.strip('"') for part in listed.partition("[")[2].rstrip("]").split(", "))
