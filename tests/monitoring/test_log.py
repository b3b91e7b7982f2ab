"""The log in chunks, and how attempts replace each other."""

from typing import Any

import pytest

from esvit_core.runs import log
from esvit_core.runs.log import LogWriter, read_log
from esvit_core.storage import ObjectStore
from esvit_core.storage.upload_queue import UploadQueue


def write(store: ObjectStore, run: str, steps: range, loss: float) -> None:
    uploads = UploadQueue(store, run)
    writer = LogWriter(uploads)
    for step in steps:
        writer.write({"step": step, "loss": loss})
    writer.flush()
    uploads.close()


def test_lines_are_read_in_order(store: Any) -> None:
    run = store.uri("runs/a")
    assert read_log(store, run) == []
    write(store, run, range(10, 40, 10), 5.0)
    assert read_log(store, run) == [{"step": s, "loss": 5.0} for s in (10, 20, 30)]


def test_a_later_attempt_replaces_repeated_lines(store: Any) -> None:
    run = store.uri("runs/a")
    write(store, run, range(10, 60, 10), 1.0)
    write(store, run, range(30, 50, 10), 2.0)  # resumed from a checkpoint at 20, and not yet beyond 40
    assert [(line["step"], line["loss"]) for line in read_log(store, run)] == [
        (10, 1.0),
        (20, 1.0),
        (30, 2.0),
        (40, 2.0),
    ]
    names = [stat.uri.rsplit("/", 1)[-1] for stat in store.list(f"{run}/training/log")]
    assert names == ["00000010-1.jsonl", "00000030-2.jsonl"]


def test_a_long_log_is_written_in_chunks(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = store.uri("runs/a")
    monkeypatch.setattr(log, "MIN_CHUNK_SECONDS", 0.0)
    monkeypatch.setattr(log, "CHUNK_SHARE_OF_AGE", 0.0)
    write(store, run, range(1, 6), 1.0)
    assert len(list(store.list(f"{run}/training/log"))) == 5
    assert [line["step"] for line in read_log(store, run)] == [1, 2, 3, 4, 5]


def test_values_that_are_none_are_left_out(store: Any) -> None:
    run = store.uri("runs/a")
    uploads = UploadQueue(store, run)
    writer = LogWriter(uploads)
    writer.write({"step": 1, "loss": 5.12345678, "loss_region": None})
    writer.flush()
    uploads.close()
    assert read_log(store, run) == [{"step": 1, "loss": 5.12346}]
