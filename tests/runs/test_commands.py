"""Commands that are printed are read as they were meant."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from runs.commands import as_value


@pytest.mark.parametrize(
    "text",
    ["a/b", "my set", "my set (1)", "2026", "1e3", "null", "True", "nan", "it's", "a\\b", "a'b\\'c", "(1)\\", "a,b", "k=é",
     " x  y ", "[a]", "~/data", "-m", "a:b", "日本"],
)  # fmt: skip
def test_hydra_reads_a_value_as_it_was(text):
    read = OverridesParser.create().parse_override(f"key={as_value(text)}").value()
    assert read == text
    assert isinstance(read, str)


def test_what_needs_no_quotes_has_none():
    assert as_value("/scratch/runs/2026-11-26/my set") == "/scratch/runs/2026-11-26/my set"
