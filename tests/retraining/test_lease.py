"""The lease: one of several owners gets it, the others are refused, and it can be taken over from a dead owner."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from esvit_core.errors import UserError
from esvit_core.retraining.find_new_data import NewData
from esvit_core.retraining.prepare_new_data import prepare_new
from esvit_core.runs.run import CONFIG, open_run


def test_one_of_several_owners_gets_the_lease_and_the_others_name_it(find) -> None:
    together = threading.Barrier(4)

    def ask(owner: str) -> NewData | UserError:
        together.wait()
        try:
            return find(owner)
        except UserError as error:
            return error

    owners = ["one", "two", "three", "four"]
    with ThreadPoolExecutor(len(owners)) as pool:
        answers = dict(zip(owners, pool.map(ask, owners), strict=True))
    ((winner, found),) = [item for item in answers.items() if isinstance(item[1], NewData)]
    reported = [str(answer) for answer in answers.values() if answer is not found]
    assert all(f"retrain: {winner} has held the lease on {found.run} since " in line for line in reported)
    assert all(
        "wait until it finishes, or, if it has died, take over with retrain.lease_hours=0" in line for line in reported
    )


def test_the_same_owner_resumes_with_the_images_found_before(store, find, grow) -> None:
    first = find()
    grow(["a"], 9)
    again = find()
    assert again.run == first.run and again.new == 12 and again.message == f"resumed: {first.message}"
    assert prepare_new(open_run(again.run, store)).samples == 12


def test_an_owner_that_writes_nothing_for_long_loses_the_lease(find, monkeypatch) -> None:
    first = find("dead")
    with pytest.raises(UserError, match="last write"):
        find("heir")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 5.9 * 3600)
    with pytest.raises(UserError, match="last write 5:5"):
        find("heir")
    monkeypatch.setattr(time, "time", lambda: now() + 6.1 * 3600)
    assert find("heir").run == first.run
    monkeypatch.undo()
    with pytest.raises(UserError, match="retrain: heir has held"):
        find("dead")


def test_any_write_of_the_run_keeps_the_lease(store, find, monkeypatch) -> None:
    first = find("alive")
    monkeypatch.setattr("esvit_core.registry.lease.datetime", LongAgo)
    store.put_bytes(f"{first.run}/training/checkpoints/00000001/x", b"1")
    with pytest.raises(UserError, match="retrain: alive has held"):
        find("heir", lease_hours=0.01)
    time.sleep(1.1)
    assert find("heir", lease_hours=0.0003).run == first.run


class LongAgo:
    """A datetime that reads every lease as acquired long ago."""

    @staticmethod
    def fromisoformat(text: str):
        from datetime import UTC, datetime

        return datetime(2020, 1, 1, tzinfo=UTC)


def test_another_request_replaces_an_unfinished_one(find, config) -> None:
    first = find()
    gentler = find(lr_scale=0.05)
    assert not gentler.nothing and not gentler.message.startswith("resumed")
    longer = config.model_copy(update={"seed": 1})
    assert find(wanted=longer).run != first.run


def test_an_attempt_that_died_after_it_acquired_the_lease_is_completed(store, find) -> None:
    first = find()
    store.remove(f"{first.run}/{CONFIG}")
    with pytest.raises(UserError, match="retrain: me has held"):
        find("another")
    assert find() == first
    assert store.exists(f"{first.run}/{CONFIG}")


def test_each_champion_has_its_own_lease(find, config) -> None:
    find("one")
    other = config.model_copy(update={"promotion": config.promotion.model_copy(update={"pointer": "second"})})
    assert not find("two", wanted=other).nothing
