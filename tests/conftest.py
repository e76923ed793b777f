"""What the tests share: small models built by hand, and the linear-Gaussian case where everything is known."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two processes share the cores

import pytest
import torch

from runs.entry import loading
from tests.evaluation.evaluations import MODELS, Runs


def pytest_collection_finish():
    with loading():  # what is imported stays, and need not be searched for cycles throughout
        pass


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Small trained runs by model, each trained when it is first asked for."""
    return Runs(tmp_path_factory, MODELS)
