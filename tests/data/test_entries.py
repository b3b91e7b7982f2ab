"""Lists of entries on disk: the same entries in the same order, from any thread, in memory that does not grow."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esvit_core.data.ingest import disk_rows
from esvit_core.data.ingest.disk_rows import DiskRows, sort_rows
from esvit_core.data.ingest.entries import Entries, Entry, Given, keep_last
from esvit_core.data.ingest.sources import open_source

NAMES = st.text(st.characters(exclude_categories=()), max_size=12) | st.sampled_from(
    ["%FF/a", "%25", "\udcff.png", "a"]
)
HANDLES = st.recursive(st.none() | st.integers() | NAMES, lambda inner: st.tuples(inner, inner), max_leaves=4)
ENTRIES = st.builds(
    Entry,
    NAMES,
    st.integers(0, 2**70),
    NAMES,
    HANDLES,
    st.none() | NAMES,
    st.none() | st.builds(Given, st.none() | NAMES, st.none() | st.sampled_from(["train", "val"])),
    st.integers(0, 3),
)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let short lists be written to disk, too."""
    monkeypatch.setattr(disk_rows, "_IN_MEMORY", 1000)
    monkeypatch.setattr(disk_rows, "_AT_ONCE", 2000)
    monkeypatch.setattr(disk_rows, "_RUN", 2 * disk_rows.BLOCK)


@given(st.lists(ENTRIES, max_size=8).map(lambda found: found * 13))
def test_entries_are_what_was_written(entries: list[Entry]) -> None:
    found = Entries(iter(entries))
    assert list(found) == entries and len(found) == len(entries)
    assert [found[i] for i in range(len(found))] == entries
    assert found[-3:] == entries[-3:] and found[5:90:7] == entries[5:90:7]
    assert list(found.names()) == [entry.name for entry in entries]


@given(st.lists(st.tuples(NAMES, st.integers(0, 9)), max_size=300))
def test_rows_are_sorted_on_disk_as_in_memory(rows: list[tuple[str, int]]) -> None:
    assert list(sort_rows(iter(rows))) == sorted(rows)


@given(st.lists(ENTRIES, max_size=150))
def test_entries_are_put_in_the_order_of_their_names(entries: list[Entry]) -> None:
    assert list(Entries(entries).by_name()) == sorted(entries, key=lambda entry: entry.name)


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers()), max_size=40))
def test_the_last_entry_of_a_name_takes_the_place_of_the_first(rows: list[tuple[str, int]]) -> None:
    named = {name: Entry(name, 0, "", handle) for name, handle in rows}
    kept, others = keep_last(Entry(name, 0, "", handle) for name, handle in rows)
    assert list(kept) == list(named.values()) and others == len(rows) - len(named)


def test_different_names_with_the_same_hash_are_both_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esvit_core.data.ingest.entries.hash", lambda name: len(name), raising=False)
    kept, others = keep_last(Entry(name, number, "", None) for number, name in enumerate(["ab", "cd", "e", "ab"]))
    assert [(entry.name, entry.size) for entry in kept] == [("ab", 3), ("cd", 1), ("e", 2)] and others == 1


def test_several_threads_read_at_the_same_time() -> None:
    entries = Entries(Entry(f"{i:05d}", i, "", (i, str(i))) for i in range(3000))
    with ThreadPoolExecutor(8) as pool:
        assert [e.size for e in pool.map(entries.__getitem__, range(2999, -1, -1))] == list(range(2999, -1, -1))


def test_nothing_remains_on_disk_and_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = len(list(Path("/proc/self/fd").iterdir()))
    entries = Entries(Entry(f"{i:05d}", i, "", None) for i in range(1000))
    assert entries[999].size == 999 and not list(tmp_path.iterdir())
    del entries
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def peak(count: int) -> int:
    """Return the peak of the memory that writing, sorting and reading so many rows takes, bytes."""
    tracemalloc.start()
    rows = DiskRows((f"a rather long name, as of a file {i:07d}", i, "stamp") for i in range(count))
    assert sum(1 for _ in sort_rows((row[0][::-1], row[1]) for row in rows)) == count
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def test_memory_does_not_grow_with_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_rows, "_RUN", 32 * disk_rows.BLOCK)
    assert peak(20_000) - peak(2_000) < 20 * 18_000


def members() -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    for name, kind, target, data in [
        ("a/1.png", tarfile.REGTYPE, "", b"one"),
        ("a/link.png", tarfile.SYMTYPE, "./1.png", b""),
        ("b/chain.png", tarfile.SYMTYPE, "../a/link.png", b""),
        ("b/hard.png", tarfile.LNKTYPE, "a/1.png", b""),
        ("a/1.png", tarfile.REGTYPE, "", b"changed"),
        ("b/early.png", tarfile.LNKTYPE, "b/late.png", b""),
        ("b/late.png", tarfile.REGTYPE, "", b"late"),
        ("b/folder.png", tarfile.SYMTYPE, "../a", b""),
        ("b/self.png", tarfile.SYMTYPE, "self.png", b""),
    ]:
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, target, len(data)
        yield member, data


def test_links_in_a_tar_lead_where_they_led_when_it_was_written(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for member, data in members():
            tar.addfile(member, io.BytesIO(data))
    found = {}
    with open_source(str(tmp_path / "a.tar")) as opened:
        for entry in opened.entries:
            try:
                found[entry.name] = opened.read(entry)
            except Exception as error:
                found[entry.name] = str(error).encode()
        assert opened.duplicates == 1
    assert found == {
        "a/1.png": b"changed",
        "a/link.png": b"changed",
        "b/chain.png": b"changed",
        "b/hard.png": b"one",
        "b/early.png": b"broken link",
        "b/late.png": b"late",
        "b/folder.png": b"broken link",
        "b/self.png": b"circular link",
    }
