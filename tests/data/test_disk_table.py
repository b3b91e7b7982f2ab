"""Dictionaries on disk behave as dictionaries whose names are in order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esvit_core.data.ingest import disk_table
from esvit_core.data.ingest.disk_table import DiskTable
from esvit_core.storage import StoreFull

names = st.text(min_size=1, max_size=4) | st.sampled_from(["a\udcff", "\ud800", "ä", "a/b"])
rows = st.tuples(st.integers(), st.none() | st.text(st.characters()), st.binary(max_size=3))


@given(st.lists(st.tuples(names, rows)), st.lists(st.tuples(names, rows)))
def test_the_last_row_of_a_name_is_found_and_names_are_in_order(first, second):
    table, expected = DiskTable(first), dict(first)
    table.update(second)
    expected.update(second)
    assert [*table.items()] == sorted(expected.items(), key=lambda item: item[0])
    assert len(table) == len(expected) and all(table[name] == row and name in table for name, row in expected.items())
    assert table.get("not there") is None and "not there" not in table
    with pytest.raises(KeyError):
        table["not there"]


def test_a_table_is_read_by_several_threads_while_it_is_changed(monkeypatch):
    monkeypatch.setattr(disk_table, "_AT_ONCE", 7)
    table = DiskTable((f"{i:04d}", (i,)) for i in range(500))
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda i: table[f"{i:04d}"], range(500))
        table.update((name, (*row, "changed")) for name, row in table.items())
        assert [row[0] for row in found] == [*range(500)]
    assert all(row == (int(name), "changed") for name, row in table.items())


def test_a_full_disk_is_reported_in_one_line():
    table = DiskTable()
    table._rows.execute("PRAGMA max_page_count = 8")
    with pytest.raises(
        StoreFull, match=r"the disk is full; a list of files needs space there: free some, or set TMPDIR$"
    ):
        table.update((str(i), ("x" * 100,)) for i in range(10_000))
