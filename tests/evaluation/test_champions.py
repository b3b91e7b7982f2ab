"""The history of the champions and the way back, against a real object store."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.evaluation.outcomes import keep_outcomes, pack_outcomes
from esvit_core.evaluation.results import measured, result_uri
from esvit_core.registry.champions import champions, roll_back
from esvit_core.registry.promotion import promote
from esvit_pipelines.cli.champion_commands import roll_back_champion, show_champions
from esvit_pipelines.cli.status_commands import RunLocation


@pytest.fixture
def crowned(store):
    """Make runs champion, one after the other: ``crowned("a", "b")``."""

    def crown(*names: str) -> None:
        for name in names:
            run = store.uri(f"runs/{name}")
            value = 50.0 + ord(name)
            figures = {"trained": {"knn/20": value}, "baseline": {"knn/20": 40.0}}
            correct = {model: {"knn/20": np.arange(10_000) < 50 * each["knn/20"]} for model, each in figures.items()}
            result = keep_outcomes(measured("knn/20", figures, ["ant", "bee"]), pack_outcomes("same", correct))
            store.put_json(result_uri(run, "knn"), {"name": "knn"} | result)
            store.publish(f"{run}/backbone", {"model.safetensors": name.encode()}, "backbone")
            assert promote(run, store, Config())["promoted"]

    return crown


def names(store) -> list[str]:
    return [champion.name for champion in champions(store, store.bucket, "champion")]


def back(store, to=None, why="") -> str:
    return roll_back(store, store.bucket, "champion", to, "ann@desk", why).name


def test_the_former_champion_comes_back_and_the_history_says_who_when_and_why(store, crowned):
    crowned("a", "b")
    assert back(store, why="worse on the line") == "a"
    now, was, first = champions(store, store.bucket, "champion")
    assert now.current and now.name == "a" and now.value == 50 + ord("a") and "ann@desk: worse" in now.reason
    assert was.name == "b" and was.rolled_back == {"time": now.time, "who": "ann@desk", "why": "worse on the line"}
    assert first.name == "a" and first.rolled_back is None
    pointer = store.read_pointer(store.uri("pointers/champion")).value
    assert pointer["backbone"] == store.uri("runs/a/backbone") and pointer["previous"] == store.uri("runs/b/backbone")


def test_twice_goes_back_two_champions_not_forth(store, crowned):
    crowned("a", "b", "c")
    assert [back(store), back(store)] == ["b", "a"]
    with pytest.raises(UserError, match="a has no earlier champion"):
        back(store)


def test_one_that_was_taken_back_can_be_named(store, crowned):
    crowned("a", "b")
    back(store)
    assert back(store, "b") == "b"
    assert names(store) == ["b", "a", "b", "a"]


def test_after_a_way_back_the_next_challenger_meets_the_one_in_use(store, crowned):
    crowned("a", "c")
    back(store)
    crowned("b")  # better than a, worse than c
    assert names(store)[0] == "b" and back(store) == "a"


@pytest.mark.parametrize(
    ("to", "message"),
    [
        (None, "b has no earlier champion"),
        ("x", "no former champion matches; the history of pointer champion has none"),
        ("b", "this run is the current"),
    ],
)
def test_where_there_is_none_it_says_so(store, crowned, to, message):
    crowned("b")
    with pytest.raises(UserError, match=message):
        back(store, to)


def test_without_any_champion_it_says_so(store):
    with pytest.raises(UserError, match="there is no champion yet"):
        back(store)


def test_a_champion_without_a_backbone_is_not_gone_back_to(store, crowned):
    crowned("a", "b")
    store.remove_prefix(store.uri("runs/a/backbone"))
    with pytest.raises(UserError, match="its backbone was deleted"):
        back(store)
    assert names(store)[0] == "b"


def test_of_two_that_go_back_at_once_one_does(store, crowned):
    crowned("a", "b", "c", "d")

    def attempt(_: int) -> str:
        try:
            return back(store, "a")
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        message = list(pool.map(attempt, range(4)))
    assert message.count("a") == 1
    assert all("in the meantime" in t or "this run is the current champion" in t for t in message if t != "a")
    assert names(store) == ["a", "d", "c", "b", "a"]


def test_the_commands_print_a_line_each(store_env, crowned, capsys):
    crowned("a", "b")
    location = RunLocation(Path("nowhere"), store_env.bucket)
    roll_back_champion(location, "champion", None, "it sees ghosts")
    assert capsys.readouterr().out.startswith("champion is a again (knn/20 147.00 %); rolled back from b by ")
    show_champions(location, "champion", as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:3] for line in lines] == ["cur", "for", "for"] and "rolled back" in lines[1] and "ghosts" in lines[1]
    show_champions(location, "champion", as_json=True)
    assert [c["current"] for c in json.loads(capsys.readouterr().out)] == [True, False, False]
