"""A plan takes a few bytes of memory per file, and is the same in any order and from any kind of source."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest

from esvit_core.config import DataConfig
from esvit_core.data.ingest import disk_rows, number_arrays, split
from esvit_core.data.ingest.entries import Entries, Entry, keep_last
from esvit_core.data.ingest.ingest_plan import IngestPlan, plan_ingest
from esvit_core.data.ingest.sample_labels import with_sample_labels


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let short lists be written to disk, too."""
    for module in (number_arrays, split):
        monkeypatch.setattr(module, "CHUNK", 256)
    monkeypatch.setattr(disk_rows, "_IN_MEMORY", 1000)
    monkeypatch.setattr(disk_rows, "_RUN", 64 * disk_rows.BLOCK)


def images(count: int) -> Iterator[Entry]:
    """Yield images of ten classes, a tenth of them held out, with a file of text beside each."""
    for number in range(count):
        folder = f"{'val' if number % 10 == 0 else 'train'}/class {number // 10 % 10}"
        yield Entry(f"{folder}/image with a long name {number:07d}.jpg", 100, "stamp", (number, 100))
        yield Entry(f"{folder}/image with a long name {number:07d}.txt", 10, "stamp", (number, 10))


def planned(count: int, **settings: object) -> IngestPlan:
    entries, _ = keep_last(images(count))
    entries = with_sample_labels(entries, lambda entry: b"")
    return plan_ingest(entries, "source", DataConfig(**settings))


def peak(count: int, **settings: object) -> int:
    """Return the peak of the memory that listing and planning take, bytes."""
    tracemalloc.start()
    plan = planned(count, **settings)
    assert len(plan.candidates) + sum(1 for _ in plan.skipped) == count
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


@pytest.mark.parametrize("settings", [{"splits": "none"}, {"max_images": 1000}], ids=str)
def test_memory_grows_by_a_few_bytes_per_file(settings: dict[str, object]) -> None:
    planned(100, **settings)  # imports and caches
    assert peak(10_000, **settings) - peak(2_000, **settings) < 40 * 8_000


def test_the_plan_does_not_depend_on_the_order_of_the_listing() -> None:
    forwards = plan_ingest(Entries(images(500)), "source", DataConfig(splits="none", max_images=300))
    entries = [*images(500)][::-1]
    backwards = plan_ingest(Entries(entries), "source", DataConfig(splits="none", max_images=300))
    assert [*forwards.candidates] == [*backwards.candidates] == forwards.candidates[:]
    assert [*forwards.skipped] == [*backwards.skipped][::-1] and len([*forwards.skipped]) == 200
    assert sorted(forwards.candidates.entries(), key=str) == sorted((c.entry for c in forwards.candidates), key=str)
