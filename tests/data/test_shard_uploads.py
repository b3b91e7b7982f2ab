"""Uploads of shards and parts: in order, and none after one that failed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from esvit_core.data.ingest.shard_uploads import ShardUploads
from esvit_core.storage.store_errors import StoreUnavailable


def test_uploads_happen_in_order_and_return_their_results() -> None:
    done: list[int] = []

    def upload(number: int) -> Callable[[], int]:
        def work() -> int:
            done.append(number)
            return 10 * number

        return work

    with ShardUploads() as uploads:
        futures = [uploads.submit(upload(number)) for number in range(20)]
        uploads.finish()
        assert done == list(range(20))
    assert [future.result() for future in futures] == [10 * number for number in range(20)]


def test_an_upload_waits_for_earlier_ones_so_that_shards_do_not_pile_up() -> None:
    done: list[int] = []
    go = threading.Event()
    with ShardUploads() as uploads:
        uploads.submit(lambda: go.wait(20) and done.append(0))
        for number in (1, 2):
            uploads.submit(lambda number=number: done.append(number))  # type: ignore[misc]
        threading.Timer(0.05, go.set).start()
        uploads.submit(lambda: done.append(3))
        assert done[0] == 0
        uploads.finish()
    assert done == [0, 1, 2, 3]


def test_small_objects_are_uploaded_several_at_a_time() -> None:
    together = threading.Barrier(3)
    with ShardUploads(parallel=3) as uploads:
        futures = [uploads.submit(lambda: together.wait(20)) for _ in range(3)]
        uploads.finish()
    assert sorted(future.result() for future in futures) == [0, 1, 2]


def test_nothing_is_uploaded_after_a_failure() -> None:
    """The record of a part must not be stored if one of its shards is not."""
    stored: list[str] = []
    begin = threading.Event()

    def lost() -> None:
        begin.wait()
        raise StoreUnavailable("gone")

    with pytest.raises(StoreUnavailable), ShardUploads() as uploads:
        uploads.submit(lost)
        part = uploads.submit(lambda: stored.append("part"))
        begin.set()
        part.result()
    assert stored == []
    with pytest.raises(StoreUnavailable):
        part.result()


def test_a_failure_is_reported_by_a_later_upload() -> None:
    def lost() -> None:
        raise StoreUnavailable("gone")

    with pytest.raises(StoreUnavailable, match="gone"), ShardUploads() as uploads:
        for _ in range(20):
            uploads.submit(lost)
