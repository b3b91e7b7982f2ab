"""Checkpoints in a real store: complete or absent, newest valid first."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from esvit_core.errors import InfrastructureError, UserError
from esvit_core.storage import ObjectStore, StoreFull, StoreUnavailable
from esvit_core.storage.publication import describe
from esvit_core.storage.retry import RetryPolicy
from esvit_core.storage.upload_queue import UploadQueue
from esvit_core.training.checkpoint import Checkpointer, RetentionPolicy

QUICK = RetryPolicy(attempts=2, base=0.01, cap=0.02)


def things() -> dict[str, Any]:
    network = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"network": network, "optimizer": optimizer}


def checkpointer(store: ObjectStore, run: str, keep: int = 3) -> Checkpointer:
    return Checkpointer(UploadQueue(store, run), RetentionPolicy(keep))


def saved(store: ObjectStore, run: str, steps: list[int], keep: int = 3) -> dict[str, Any]:
    stateful = things()
    checkpoints = checkpointer(store, run, keep)
    for step in steps:
        stateful["network"].bias.data.fill_(step)
        checkpoints.save(step, stateful)
        checkpoints.wait()
    return stateful


def folders(store: ObjectStore, run: str) -> list[int]:
    root = f"{run}/training/checkpoints/"
    return sorted({int(stat.uri.removeprefix(root).partition("/")[0]) for stat in store.list(root)})


def test_what_is_saved_comes_back_exactly(store: Any) -> None:
    run = store.uri("runs/a")
    stateful = saved(store, run, [7])
    restored = checkpointer(store, run).restore()
    assert restored is not None and restored.step == 7
    other = things()
    for name, thing in other.items():
        thing.load_state_dict(restored.states[name])
    assert torch.equal(other["network"].weight, stateful["network"].weight)
    moments = [o["optimizer"].state_dict()["state"][0]["exp_avg"] for o in (other, stateful)]
    assert torch.equal(*moments)


def test_training_does_not_change_a_checkpoint_that_is_being_written(store: Any) -> None:
    run, stateful = store.uri("runs/a"), things()
    expected = copy.deepcopy(stateful["network"].state_dict())
    checkpoints = checkpointer(store, run)
    checkpoints.save(1, stateful)
    stateful["network"].weight.data.zero_()
    checkpoints.wait()
    restored = checkpointer(store, run).restore()
    assert restored is not None and torch.equal(restored.states["network"]["weight"], expected["weight"])


def test_restore_without_a_checkpoint_returns_none(store: Any) -> None:
    assert checkpointer(store, store.uri("runs/a")).restore() is None


def test_only_the_newest_are_kept_and_latest_points_to_the_last(store: Any) -> None:
    run = store.uri("runs/a")
    saved(store, run, [10, 20, 30, 40], keep=2)
    assert folders(store, run) == [30, 40]
    assert store.get_json(f"{run}/training/latest") == {"step": 40}


def damage(store: ObjectStore, uri: str, how: str) -> None:
    name = f"{uri}/network.pt"
    data = store.get_bytes(name)
    if how == "truncated":
        store.put_bytes(name, data[: len(data) // 2])
    elif how == "one byte flipped":
        store.put_bytes(name, data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif how == "file missing":
        store.remove(name)
    elif how == "manifest missing":
        store.remove(f"{uri}/manifest.json")
    else:
        store.put_bytes(f"{uri}/manifest.json", b"{")


@pytest.mark.parametrize(
    "how", ["truncated", "one byte flipped", "file missing", "manifest missing", "manifest truncated"]
)
def test_a_damaged_newest_checkpoint_is_skipped_and_named(store: Any, how: str) -> None:
    run = store.uri("runs/a")
    saved(store, run, [10, 20])
    damage(store, f"{run}/training/checkpoints/00000020", how)
    checkpoints = checkpointer(store, run)
    restored = checkpoints.restore()
    assert restored is not None and restored.step == 10
    assert len(checkpoints.skipped) == 1 and "00000020" in checkpoints.skipped[0]
    assert ("incomplete" in checkpoints.skipped[0]) == (how == "manifest missing")


def test_a_damaged_checkpoint_is_replaced_and_does_not_count_as_kept(store: Any) -> None:
    run = store.uri("runs/a")
    stateful = saved(store, run, [10, 20, 30], keep=2)
    damage(store, f"{run}/training/checkpoints/00000030", "truncated")
    checkpoints = checkpointer(store, run, 2)
    assert checkpoints.restore() is not None
    checkpoints.save(25, stateful)
    checkpoints.wait()
    assert folders(store, run) == [20, 25]
    checkpoints.save(30, stateful)
    checkpoints.wait()
    assert folders(store, run) == [25, 30]
    restored = checkpointer(store, run, 2).restore()
    assert restored is not None and restored.step == 30


@pytest.mark.parametrize("content", [b"", b"hello world", "half an archive", "an archive of something else"])
def test_verified_bytes_that_are_not_a_saved_state_count_as_damage(
    store: Any, tmp_path: Path, content: bytes | str
) -> None:
    run = store.uri("runs/a")
    saved(store, run, [10])
    file = tmp_path / "network.pt"
    torch.save({"a": torch.ones(100)}, file)
    if content == "half an archive":
        content = file.read_bytes()[: file.stat().st_size // 2]
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(things()["network"], file)  # a whole module, which is not loaded from anywhere
    store.publish(f"{run}/training/checkpoints/00000020", {"network.pt": file}, "checkpoint", {"step": 20})
    checkpoints = checkpointer(store, run)
    restored = checkpoints.restore()
    assert restored is not None and restored.step == 10
    assert "not a saved state" in checkpoints.skipped[0]


@pytest.mark.parametrize(
    "failure, family",
    [
        (MemoryError(), MemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError),
        (TypeError("a bug"), TypeError),
        (OSError(errno.EIO, "Input/output error"), OSError),
    ],
)
def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(
    store: Any, monkeypatch: pytest.MonkeyPatch, failure: Exception, family: type[Exception]
) -> None:
    run = store.uri("runs/a")
    stateful = saved(store, run, [10, 20])
    checkpoints = checkpointer(store, run)
    with monkeypatch.context() as patched:

        def fail(*_: Any, **__: Any) -> None:
            raise failure

        patched.setattr(torch, "load", fail)
        with pytest.raises(family):
            checkpoints.restore()
    assert checkpoints.skipped == []
    restored = checkpoints.restore()
    assert restored is not None and restored.step == 20
    checkpoints.save(30, stateful)
    checkpoints.wait()
    assert folders(store, run) == [10, 20, 30]  # what is damaged is removed when another is complete


def test_a_full_disk_while_reading_is_not_damage(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = store.uri("runs/a")
    saved(store, run, [10, 20])

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(StoreFull):
            checkpointer(store, run).restore()
    assert folders(store, run) == [10, 20]


def test_when_none_is_valid_the_run_does_not_start_over_by_itself(store: Any) -> None:
    run = store.uri("runs/a")
    saved(store, run, [10])
    damage(store, f"{run}/training/checkpoints/00000010", "truncated")
    with pytest.raises(UserError, match="none of its checkpoints is valid"):
        checkpointer(store, run).restore()


def test_a_second_writer_of_the_same_run_is_refused(store: Any) -> None:
    run = store.uri("runs/a")

    class Raced(ObjectStore):
        def read_pointer(self, uri: str) -> Any:
            found = super().read_pointer(uri)
            store.put_json(uri, {"step": 999})  # the other one is quicker
            return found

    with pytest.raises(InfrastructureError, match="another process"):
        saved(Raced(store.address), run, [5])


def test_retention_keeps_the_last_the_epochs_and_the_best() -> None:
    losses: dict[int, float | None] = {4: None, 10: 3.0, 14: 1.0, 20: 2.0, 24: 2.5, 28: 2.5}
    assert RetentionPolicy(2).kept(losses) == {24, 28}
    assert RetentionPolicy(1, every_steps=10).kept(losses) == {10, 20, 28}
    assert RetentionPolicy(1, best=True).kept(losses) == {14, 28}
    assert RetentionPolicy(1, best=True).kept({4: None, 8: None}) == {8}


def test_the_best_checkpoint_is_known_after_a_restart(store: Any) -> None:
    run, stateful = store.uri("runs/a"), things()
    for step, loss in ((1, 5.0), (2, 3.0), (3, 4.0), (4, 6.0)):
        checkpoints = Checkpointer(UploadQueue(store, run), RetentionPolicy(1, best=True))
        checkpoints.save(step, stateful, loss)
        checkpoints.wait()
    assert folders(store, run) == [2, 4]
    assert store.get_json(f"{run}/training/checkpoints/00000002/manifest.json")["loss"] == 3.0


def test_a_local_checkpoint_is_resumed_from_and_uploaded(store: Any, tmp_path: Path) -> None:
    run, elsewhere = store.uri("runs/a"), tmp_path / "pending"
    saved(store, run, [10])
    silent = ObjectStore(dataclasses.replace(store.address, endpoint="127.0.0.1:9", directory=None), QUICK)
    stateful, message = things(), []
    lost = Checkpointer(UploadQueue(silent, run, directory=elsewhere, log=message.append))
    stateful["network"].bias.data.fill_(20)
    lost.save(20, stateful)
    assert not lost.wait(0.5)
    assert "no answer" in message[0] and str(elsewhere) in message[0]

    next_start = Checkpointer(UploadQueue(store, run, directory=elsewhere))
    restored = next_start.restore()
    assert restored is not None and restored.step == 20 and restored.location == str(elsewhere / "sets" / "00000020")
    assert restored.states["network"]["bias"].tolist() == [20, 20]
    assert next_start.wait(30)
    assert folders(store, run) == [10, 20]
    assert not list((elsewhere / "sets").iterdir())
    again = checkpointer(store, run).restore()
    assert again is not None and again.location == f"{run}/training/checkpoints/00000020"


@pytest.mark.parametrize("how", ["older than the store's", "damaged", "without a manifest"])
def test_an_outdated_or_damaged_local_checkpoint_is_not_used(store: Any, tmp_path: Path, how: str) -> None:
    run, step = store.uri("runs/a"), 5 if how == "older than the store's" else 20
    saved(store, run, [10])
    uploads = UploadQueue(store, run, directory=tmp_path)
    half = uploads.begin_set(f"{step:08d}")
    torch.save(things()["network"].state_dict(), half / "network.pt")
    (half / "manifest.json").write_text(json.dumps(describe(half, "checkpoint", {"step": step})))
    complete = half.rename(tmp_path / "sets" / f"{step:08d}")
    if how == "damaged":
        data = (complete / "network.pt").read_bytes()
        (complete / "network.pt").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "without a manifest":
        (complete / "manifest.json").unlink()
    checkpoints = Checkpointer(uploads)
    restored = checkpoints.restore()
    assert restored is not None and restored.step == 10
    assert [str(complete) in why and "damaged" in why for why in checkpoints.skipped] == [True] * (how == "damaged")
    assert complete.exists() == (how == "without a manifest")


def test_a_full_local_disk_is_reported_in_one_line(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = store.uri("runs/a")
    saved(store, run, [10])
    checkpoints = Checkpointer(UploadQueue(store, run, directory=tmp_path))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    checkpoints.save(20, things())
    with pytest.raises(
        InfrastructureError, match=r"step 20: cannot be written to .* \(.*No space left.*ESVIT_PENDING_DIR"
    ):
        checkpoints.wait()
    monkeypatch.undo()
    restored = Checkpointer(UploadQueue(store, run, directory=tmp_path)).restore()
    assert restored is not None and restored.step == 10


def test_a_stale_upload_of_a_killed_process_is_skipped_and_replaced(store: Any) -> None:
    run = store.uri("runs/a")
    stateful = saved(store, run, [10])
    store.put_bytes(f"{run}/training/checkpoints/00000020/network.pt", b"half an upload")
    checkpoints = checkpointer(store, run)
    restored = checkpoints.restore()
    assert restored is not None and restored.step == 10
    assert "00000020 is incomplete" in checkpoints.skipped[0]
    checkpoints.save(20, stateful)
    checkpoints.wait()
    restored = checkpointer(store, run).restore()
    assert restored is not None and restored.step == 20


def test_a_stale_process_removes_no_newer_checkpoint(store: Any) -> None:
    """Of two processes at one run, such as one whose node was given up for lost, only one goes on."""
    run = store.uri("runs/a")
    stateful = saved(store, run, [10])
    left_behind, other = checkpointer(store, run, 2), checkpointer(store, run, 2)
    assert left_behind.restore() is not None and other.restore() is not None
    for step in (30, 40):
        other.save(step, stateful)
        other.wait()
    left_behind.save(20, stateful)
    with pytest.raises(InfrastructureError, match="another process writes checkpoints of this run"):
        left_behind.wait()
    assert {30, 40} <= {*folders(store, run)}
    other.save(50, stateful)
    other.wait()
    assert folders(store, run) == [40, 50]


def test_a_checkpoint_that_is_uploaded_twice_stays_complete(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upload queue repeats a delivery that failed at its end."""
    run = store.uri("runs/a")
    stateful, checkpoints = things(), checkpointer(store, run)
    point, removed, calls = Checkpointer._point_to, [], []

    def fails_once(self: Checkpointer, step: int) -> None:
        calls.append(step)
        if len(calls) == 1:
            raise StoreUnavailable("no answer")
        point(self, step)

    monkeypatch.setattr(Checkpointer, "_point_to", fails_once)
    monkeypatch.setattr(ObjectStore, "remove_prefix", lambda self, uri: removed.append(uri))
    checkpoints.save(10, stateful)
    checkpoints.wait()
    assert calls == [10, 10] and removed == [] and folders(store, run) == [10]
