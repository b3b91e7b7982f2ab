"""The event log of a run."""

from __future__ import annotations

import time
from typing import Any

from esvit_core.runs.events import count_starts, read_events, record_event


def test_events_are_read_in_the_order_of_writing(store: Any) -> None:
    run = store.uri("runs/a")
    assert read_events(store, run) == [] and count_starts(store, run) == 0
    written = [
        record_event(store, run, "started", step=0, facts={"steps": 12, "processes": 2}),
        record_event(store, run, "failed", reason="process 1 was killed by SIGKILL", rank=1),
        record_event(store, run, "started", step=8),
        record_event(store, run, "stopped", step=9, reason="asked to stop"),
    ]
    assert read_events(store, run) == written
    assert count_starts(store, run) == 2
    assert abs(written[0].time - time.time()) < 60 and written[0].host


def test_fields_and_kinds_of_later_versions_are_ignored(store: Any) -> None:
    run = store.uri("runs/a")
    entry = record_event(store, run, "started", step=3)
    (stat,) = store.list(f"{run}/events")
    store.put_json(stat.uri, {**entry.as_json(), "weather": "rain"})
    store.put_json(f"{run}/events/20261124T000000.000Z-aaaaaa-rested.json", {"kind": "rested"})
    assert read_events(store, run) == [entry]
