import pytest

from tests.evaluation.evaluations import MODELS, Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Small trained runs by model, each trained when it is first asked for."""
    return Runs(tmp_path_factory, MODELS)
