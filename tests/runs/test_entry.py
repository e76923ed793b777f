"""How an entry point starts."""

import gc

import pytest

from runs.entry import loading


def test_the_collector_leaves_alone_what_is_imported_and_searches_what_comes_after():
    before = gc.get_freeze_count()
    with loading():
        assert not gc.isenabled()
        imported = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(imported)
    cycle = []
    cycle.append(cycle)
    del cycle
    assert gc.collect() > 0


def test_the_collector_works_on_where_an_import_fails():
    with pytest.raises(ModuleNotFoundError), loading():
        import no_such_module  # noqa: F401
    assert gc.isenabled()
