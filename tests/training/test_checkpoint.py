"""Checkpoints in a real store: complete or absent, newest valid first."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from esvit_core.errors import UserError
from esvit_core.storage import ObjectStore
from esvit_core.training.checkpoint import Checkpointer


def things() -> dict[str, Any]:
    network = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"network": network, "optimizer": optimizer}


def saved(store: ObjectStore, run: str, steps: list[int], keep: int = 3) -> dict[str, Any]:
    stateful = things()
    checkpoints = Checkpointer(store, run, keep)
    for step in steps:
        stateful["network"].bias.data.fill_(step)
        checkpoints.save(step, stateful)
    checkpoints.close()
    return stateful


def folders(store: ObjectStore, run: str) -> list[int]:
    root = f"{run}/training/checkpoints/"
    return sorted({int(stat.uri.removeprefix(root).partition("/")[0]) for stat in store.list(root)})


def test_what_is_saved_comes_back_exactly(store: Any) -> None:
    run = store.uri("runs/a")
    stateful = saved(store, run, [7])
    restored = Checkpointer(store, run, 3).restore()
    assert restored is not None and restored.step == 7
    other = things()
    for name, thing in other.items():
        thing.load_state_dict(restored.states[name])
    assert torch.equal(other["network"].weight, stateful["network"].weight)
    moments = [o["optimizer"].state_dict()["state"][0]["exp_avg"] for o in (other, stateful)]
    assert torch.equal(*moments)


def test_training_that_goes_on_does_not_change_what_is_being_written(store: Any) -> None:
    run, stateful = store.uri("runs/a"), things()
    expected = copy.deepcopy(stateful["network"].state_dict())
    checkpoints = Checkpointer(store, run, 3)
    checkpoints.save(1, stateful)
    stateful["network"].weight.data.zero_()
    checkpoints.close()
    restored = Checkpointer(store, run, 3).restore()
    assert restored is not None and torch.equal(restored.states["network"]["weight"], expected["weight"])


def test_no_checkpoint_is_none(store: Any) -> None:
    assert Checkpointer(store, store.uri("runs/a"), 3).restore() is None


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
def test_a_damaged_newest_one_is_passed_over_and_named(store: Any, how: str) -> None:
    run = store.uri("runs/a")
    saved(store, run, [10, 20])
    damage(store, f"{run}/training/checkpoints/00000020", how)
    checkpoints = Checkpointer(store, run, 3)
    restored = checkpoints.restore()
    assert restored is not None and restored.step == 10
    assert len(checkpoints.passed_over) == 1 and "00000020" in checkpoints.passed_over[0]
    assert ("incomplete" in checkpoints.passed_over[0]) == (how == "manifest missing")


def test_a_damaged_one_is_written_anew_and_does_not_count_as_kept(store: Any) -> None:
    run = store.uri("runs/a")
    stateful = saved(store, run, [10, 20, 30], keep=2)
    damage(store, f"{run}/training/checkpoints/00000030", "truncated")
    checkpoints = Checkpointer(store, run, 2)
    assert checkpoints.restore() is not None
    checkpoints.save(25, stateful, wait=True)
    assert folders(store, run) == [20, 25]
    checkpoints.save(30, stateful, wait=True)
    assert folders(store, run) == [25, 30]
    restored = Checkpointer(store, run, 2).restore()
    assert restored is not None and restored.step == 30


def test_when_none_is_valid_the_run_does_not_start_over_by_itself(store: Any) -> None:
    run = store.uri("runs/a")
    saved(store, run, [10])
    damage(store, f"{run}/training/checkpoints/00000010", "truncated")
    with pytest.raises(UserError, match="none of its checkpoints is valid"):
        Checkpointer(store, run, 3).restore()


def test_a_second_writer_of_the_same_run_is_refused(store: Any) -> None:
    run, stateful = store.uri("runs/a"), things()

    class Raced(ObjectStore):
        def read_pointer(self, uri: str) -> Any:
            found = super().read_pointer(uri)
            store.put_json(uri, {"step": 999})  # the other one is quicker
            return found

    with pytest.raises(UserError, match="another process"):
        Checkpointer(Raced(store.address), run, 3).save(5, stateful, wait=True)
