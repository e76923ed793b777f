"""An import only ever points down."""

import ast

import pytest

from tests.jobs import ROOT

FLOORS = {
    "losses": 0, "diffusion": 1, "networks": 2, "datamodules": 2, "lightning_modules": 3,
    "callbacks": 4, "loggers": 4, "runs": 4, "evaluation": 4, "sampling": 4, "comparison": 4,
    "train": 5, "evaluate": 5, "sample": 5, "compare": 5, "prepare": 5, "hydra_plugins": 5, "benchmarks": 6, "tests": 7,
}  # fmt: skip
# these put a job together out of what their own floor holds
ACROSS = {
    ("runs", "callbacks"), ("runs", "loggers"), ("evaluation", "runs"), ("evaluation", "callbacks"), ("comparison", "runs"),
    ("sampling", "runs"), ("sampling", "callbacks"), ("sampling", "evaluation"),
}  # fmt: skip
ENTRIES = [ROOT / f"{name}.py" for name in ("train", "evaluate", "sample", "compare", "prepare")]
FILES = [path for name in FLOORS for path in (ROOT / name).rglob("*.py")] + ENTRIES


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if not node.module.startswith("hydra_plugins.hydra_"):  # of other packages, which share that name
                yield node.module.split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path):
    here = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for there in set(imported(path)) & set(FLOORS):
        assert there == here or FLOORS[there] < FLOORS[here] or (here, there) in ACROSS, f"{here} imports {there}"


@pytest.mark.parametrize("path", sorted((ROOT / "losses").glob("*.py")), ids=lambda path: path.name)
def test_losses_need_torch_only(path):
    standard = {"__future__", "math", "collections", "contextlib", "dataclasses", "typing", "hashlib"}
    assert set(imported(path)) <= standard | {"torch", "losses"}
