"""What happened to a run, written once each."""

from __future__ import annotations

import time
from typing import Any

from esvit_core.runs.events import note, read_journal, starts


def test_entries_come_back_in_the_order_in_which_they_were_written(store: Any) -> None:
    run = store.uri("runs/a")
    assert read_journal(store, run) == [] and starts(store, run) == 0
    written = [
        note(store, run, "started", step=0, facts={"steps": 12, "processes": 2}),
        note(store, run, "failed", reason="process 1 was killed by SIGKILL", rank=1),
        note(store, run, "started", step=8),
        note(store, run, "stopped", step=9, reason="asked to stop"),
    ]
    assert read_journal(store, run) == written
    assert starts(store, run) == 2
    assert abs(written[0].time - time.time()) < 60 and written[0].host


def test_what_a_later_version_adds_is_passed_over(store: Any) -> None:
    run = store.uri("runs/a")
    entry = note(store, run, "started", step=3)
    (stat,) = store.list(f"{run}/journal")
    store.put_json(stat.uri, {**entry.as_json(), "weather": "rain"})
    store.put_json(f"{run}/journal/20261124T000000.000Z-aaaaaa-rested.json", {"kind": "rested"})
    assert read_journal(store, run) == [entry]
