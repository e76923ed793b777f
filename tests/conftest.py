"""What the tests share: small models built by hand, and the linear-Gaussian case where everything is known."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two processes share the cores

import pytest
import torch


def pytest_collection_finish():
    gc.freeze()  # what is imported stays, and need not be searched for cycles throughout


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
