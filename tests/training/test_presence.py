"""A training job that no step follows any more ends with a checkpoint; one that is followed does not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from esvit_core.errors import InfrastructureError
from esvit_core.launch.kubernetes import presence
from esvit_core.launch.kubernetes.presence import MARK, UNFOLLOWED_VARIABLE, PresenceWatch, marked_presence
from esvit_core.launch.launcher import launch_training
from esvit_core.storage import ObjectStore, StoreUnavailable

EVERY, SECONDS = 0.05, 0.5


@pytest.fixture
def watched(store: Any) -> Callable[[], threading.Event]:
    def start() -> threading.Event:
        reported = threading.Event()
        watches.append(PresenceWatch(store, store.uri("runs/a"), SECONDS, reported.set, EVERY).start())
        return reported

    watches: list[PresenceWatch] = []
    yield start
    for watch in watches:
        watch.stop()


def test_a_follower_that_ends_is_missed_and_one_that_goes_on_is_not(store: Any, watched: Any) -> None:
    with marked_presence(store, store.uri("runs/a"), EVERY):
        reported = watched()
        assert not reported.wait(4 * SECONDS)
    assert reported.wait(20 * SECONDS)


def test_a_second_follower_takes_over(store: Any, watched: Any) -> None:
    with marked_presence(store, store.uri("runs/a"), EVERY):
        reported = watched()
        time.sleep(SECONDS / 2)
    with marked_presence(store, store.uri("runs/a"), EVERY):
        assert not reported.wait(3 * SECONDS)


def test_without_a_mark_nothing_is_reported(watched: Any) -> None:
    assert not watched().wait(3 * SECONDS)


def test_time_without_the_store_does_not_count(store: Any, watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put_json(store.uri(f"runs/a/{MARK}"), {"time": "once"})
    read, away = ObjectStore.get_bytes, threading.Event()

    def read_or_not(self: ObjectStore, uri: str) -> bytes:
        if away.is_set() and uri.endswith(MARK):
            raise StoreUnavailable(f"{uri}: no answer")
        return read(self, uri)

    monkeypatch.setattr(ObjectStore, "get_bytes", read_or_not)
    reported = watched()
    away.set()
    assert not reported.wait(4 * SECONDS)
    away.clear()
    assert reported.wait(20 * SECONDS)


def test_a_mark_that_cannot_be_written_does_not_end_the_follower(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def put(self: ObjectStore, uri: str, value: Any) -> None:
        written.append(1)
        raise StoreUnavailable(f"{uri}: no answer")

    monkeypatch.setattr(ObjectStore, "put_json", put)
    with marked_presence(store, store.uri("runs/a"), EVERY):
        time.sleep(6 * EVERY)
    assert len(written) > 1


def test_a_training_that_nobody_follows_ends_with_a_checkpoint_and_resumes(
    micro_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = micro_run("unfollowed", training={"epochs": 200, "processes": 2, "checkpoint_steps": 10_000})
    run.store.put_json(f"{run.uri}/{MARK}", {"time": "long ago"})
    monkeypatch.setenv(UNFOLLOWED_VARIABLE, "2")
    with pytest.raises(InfrastructureError, match="ended without a summary; rerun the command to resume"):
        launch_training(run.uri, run.config)  # both processes end with 0: the job is over
    output = capfd.readouterr().out
    assert "no step has followed this job for" in output and "ending it with a checkpoint" in output
    step = run.checkpointed_step()
    assert 0 < step < 800 and not run.store.exists(f"{run.uri}/training/summary.json")
    assert f"stopped after step {step}" in output and not run.processes()


def test_the_mark_is_where_the_role_that_trains_may_write() -> None:
    from esvit_core.storage.roles import may_write

    assert may_write("train", f"runs/a/{MARK}") and presence.MARK_SECONDS * 2 <= 120
