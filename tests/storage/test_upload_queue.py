"""The upload queue, with a store that is temporarily unavailable."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from esvit_core.errors import UserError
from esvit_core.storage import ObjectStore, StoreRefused, StoreUnavailable, upload_queue
from esvit_core.storage.store_errors import PathError
from esvit_core.storage.upload_queue import UploadQueue, pending_folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_queue, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(upload_queue, "LONGEST_WAIT", 0.05)


def sent(queue: UploadQueue, name: str, content: bytes) -> None:
    (queue.begin_set(name) / "file").write_bytes(content)
    queue.enqueue_set(
        name, {}, lambda folder: queue.store.put_bytes(f"{queue.uri}/{name}", (folder / "file").read_bytes())
    )


def test_uploads_leave_nothing_behind(store: Any, tmp_path: Path) -> None:
    queue = UploadQueue(store, store.uri("a"), directory=tmp_path)
    queue.put("log/one piece.txt", b"1")
    sent(queue, "set", b"2")
    assert queue.close()
    assert {stat.uri: store.get_bytes(stat.uri) for stat in store.list(store.uri("a"))} == {
        store.uri("a/log/one piece.txt"): b"1",
        store.uri("a/set"): b"2",
    }
    assert not tmp_path.exists()


def test_objects_and_the_newest_set_wait_during_an_outage(store: Any, proxy: Any, through_proxy: Any) -> None:
    lines: list[str] = []
    queue = UploadQueue(through_proxy, store.uri("a"), log=lines.append)
    proxy.plan += ["refuse"] * 40
    start = time.monotonic()
    queue.put("1", b"1")
    for name in ("old", "newer", "newest"):
        sent(queue, name, name.encode())
    queue.put("2", b"2")
    assert time.monotonic() - start < 1  # the caller did not wait
    assert list(queue.pending_sets()) == ["newest"]
    assert queue.close(60)
    assert [stat.uri.rpartition("/")[2] for stat in store.list(store.uri("a"))] == ["1", "2", "newest"]
    assert "uploads wait in" in lines[0] and "answers again after" in lines[1] and len(lines) == 2


def test_the_next_process_uploads_what_a_killed_one_left(store: Any, scripted: Any, tmp_path: Path) -> None:
    silent = scripted((503, "SlowDown")).store()
    queue = UploadQueue(silent, store.uri("a"), directory=tmp_path, log=lambda line: None)
    queue.put("1", b"1")
    sent(queue, "set", b"2")
    assert not queue.wait(0.2)
    queue.begin_set("half")  # the process dies here
    following = UploadQueue(store, store.uri("a"), directory=tmp_path)
    assert following.close(30)
    assert store.get_bytes(store.uri("a/1")) == b"1"
    assert list(following.pending_sets()) == ["set"]  # the caller decides whether it is still wanted
    assert not list((tmp_path / "sets").glob(".*"))


def test_an_outage_beyond_the_grace_period_is_an_error_and_keeps_the_files(scripted: Any, tmp_path: Path) -> None:
    queue = UploadQueue(scripted((503, "SlowDown")).store(), "s3://bucket/a", 0.3, tmp_path, log=lambda line: None)
    sent(queue, "set", b"2")
    with pytest.raises(StoreUnavailable, match=r"longer than the grace period of .* rerun the same command"):
        queue.wait(30)
    assert list(queue.pending_sets()) == ["set"]
    with pytest.raises(StoreUnavailable):
        queue.put("1", b"1")


def test_a_refusal_is_an_error_at_once(scripted: Any, tmp_path: Path) -> None:
    queue = UploadQueue(scripted((403, "AccessDenied")).store(), "s3://bucket/a", directory=tmp_path)
    queue.put("1", b"1")
    with pytest.raises(StoreRefused):
        queue.wait(30)


def test_the_location_of_pending_files(store: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = store.uri("runs/a")
    assert pending_folder(store, run).parent == store.address.directory / "pending"
    assert pending_folder(store, run) != pending_folder(store, store.uri("other/a"))
    monkeypatch.setenv("ESVIT_PENDING_DIR", str(tmp_path))
    assert pending_folder(ObjectStore(store.address), run).parent == tmp_path
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="ESVIT_PENDING_DIR"):
        UploadQueue(store, run, directory=tmp_path / "file")


def test_a_folder_that_is_just_being_deleted_is_named_as_deleted(store: Any) -> None:
    """The marker of the store, which is in the same folder, may be the last file to go."""
    queue = UploadQueue(store, store.uri("deleted"))
    shutil.rmtree(queue.folder)
    with pytest.raises(PathError, match="was deleted while in use"):
        queue.put("1", b"1")


def test_flushed_objects_overtake_a_set_that_is_being_uploaded(store: Any, tmp_path: Path) -> None:
    queue, sending, go_on = UploadQueue(store, store.uri("a"), directory=tmp_path), threading.Event(), threading.Event()

    def deliver(folder: Path) -> None:
        sending.set()
        go_on.wait(60)
        store.put_bytes(store.uri("a/set"), b"2")

    queue.begin_set("set")
    queue.enqueue_set("set", {}, deliver)
    assert sending.wait(60)
    for number in range(3):
        queue.put(f"log/{number}", b"1")
    queue.flush_objects()
    assert [stat.uri.rpartition("/")[2] for stat in store.list(store.uri("a"))] == ["0", "1", "2"]
    go_on.set()
    assert queue.close(60) and store.exists(store.uri("a/set"))
