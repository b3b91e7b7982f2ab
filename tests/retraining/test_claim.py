"""Two at once: one goes on, the other is told who has it; and the dead do not block for ever."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from esvit_core.errors import UserError
from esvit_core.retraining.find_new_data import Found
from esvit_core.retraining.prepare_new_data import prepare_new
from esvit_core.runs.run import CONFIG, open_run


def test_of_several_at_once_one_wins_and_the_others_say_who(find) -> None:
    together = threading.Barrier(4)

    def ask(owner: str) -> Found | UserError:
        together.wait()
        try:
            return find(owner)
        except UserError as error:
            return error

    owners = ["one", "two", "three", "four"]
    with ThreadPoolExecutor(len(owners)) as pool:
        answers = dict(zip(owners, pool.map(ask, owners), strict=True))
    ((winner, found),) = [item for item in answers.items() if isinstance(item[1], Found)]
    told = [str(answer) for answer in answers.values() if answer is not found]
    assert all(f"retrain: {winner} is at {found.run} since " in line for line in told)
    assert all("wait for it, or, if it is dead, take over with retrain.claim_hours=0" in line for line in told)


def test_the_same_owner_goes_on_with_what_was_found_then(store, find, grow) -> None:
    first = find()
    grow(["a"], 9)
    again = find()
    assert again.run == first.run and again.new == 12 and again.told == f"going on: {first.told}"
    assert prepare_new(open_run(again.run, store)).samples == 12


def test_whoever_is_silent_for_long_loses_it(find, monkeypatch) -> None:
    first = find("dead")
    with pytest.raises(UserError, match="last sign of life"):
        find("heir")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 5.9 * 3600)
    with pytest.raises(UserError, match="last sign of life 5:5"):
        find("heir")
    monkeypatch.setattr(time, "time", lambda: now() + 6.1 * 3600)
    assert find("heir").run == first.run
    monkeypatch.undo()
    with pytest.raises(UserError, match="retrain: heir is at"):
        find("dead")


def test_whatever_the_run_writes_is_a_sign_of_life(store, find, monkeypatch) -> None:
    first = find("alive")
    monkeypatch.setattr("esvit_core.registry.lease.datetime", Long)
    store.put_bytes(f"{first.run}/training/checkpoints/00000001/x", b"1")
    with pytest.raises(UserError, match="retrain: alive is at"):
        find("heir", claim_hours=0.01)
    time.sleep(1.1)
    assert find("heir", claim_hours=0.0003).run == first.run


class Long:
    """A claim's time that lies far back."""

    @staticmethod
    def fromisoformat(text: str):
        from datetime import UTC, datetime

        return datetime(2020, 1, 1, tzinfo=UTC)


def test_another_request_takes_the_place_of_an_unfinished_one(find, config) -> None:
    first = find()
    gentler = find(lr_scale=0.05)
    assert not gentler.nothing and not gentler.told.startswith("going on")
    longer = config.model_copy(update={"seed": 1})
    assert find(wanted=longer).run != first.run


def test_an_attempt_that_died_between_claim_and_beginning_is_made_good(store, find) -> None:
    first = find()
    store.remove(f"{first.run}/{CONFIG}")
    with pytest.raises(UserError, match="retrain: me is at"):
        find("another")
    assert find() == first
    assert store.exists(f"{first.run}/{CONFIG}")


def test_another_champion_s_retraining_is_another_claim(find, config) -> None:
    find("one")
    other = config.model_copy(update={"promotion": config.promotion.model_copy(update={"pointer": "second"})})
    assert not find("two", wanted=other).nothing
