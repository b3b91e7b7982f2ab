"""A training whose object store is stopped and started again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_core.errors import InfrastructureError
from esvit_core.launch.signals import StopRequest
from esvit_core.runs.log import read_log
from esvit_core.storage import ObjectStore, upload_queue
from esvit_core.storage.embedded import EmbeddedStore
from esvit_core.training.main import run_training

EVERY_STEP = {"checkpoint_steps": 1, "log_steps": 1}


@pytest.fixture
def server(tmp_path: Path, store_env: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedStore]:
    """A server of the test's own, which the environment names; the fixtures' store becomes one on it."""
    monkeypatch.setattr(upload_queue, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(upload_queue, "LONGEST_WAIT", 0.2)
    made = EmbeddedStore(tmp_path / "store")
    for name, value in made.start().environment().items():
        monkeypatch.setenv(name, value)
    store_env.__dict__ |= ObjectStore.from_env().__dict__
    store_env.ensure_bucket(store_env.bucket)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield made
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    made.stop()


class At(StopRequest):
    """Never asked to stop; does things when it is looked at, which is once a step."""

    def __init__(self, actions: dict[int, Callable[[], Any]]) -> None:
        super().__init__()
        self.actions, self.looks = actions, 0

    @property
    def requested(self) -> bool:
        self.looks += 1
        self.actions.get(self.looks, lambda: None)()
        return False


def test_a_training_survives_an_outage_of_its_store(
    server: EmbeddedStore, micro_run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = micro_run("whole", training=EVERY_STEP)
    assert run_training(whole.uri, StopRequest()) == 0

    bridged, output = micro_run("bridged", training=EVERY_STEP), ""

    def start_when_it_was_missed() -> None:
        nonlocal output
        end = time.monotonic() + 60
        while "uploads wait in" not in output and time.monotonic() < end:
            output += capsys.readouterr().out
            time.sleep(0.05)
        server.start()

    assert run_training(bridged.uri, At({4: server.stop, 9: start_when_it_was_missed})) == 0
    output += capsys.readouterr().out
    assert "uploads wait in" in output
    assert "the object store answers again after" in output
    assert bridged.weights() == whole.weights()
    assert [line["step"] for line in read_log(bridged.store, bridged.uri)] == list(range(1, 13))
    assert bridged.checkpointed_step() == 12

    given_up = micro_run("given-up", training=EVERY_STEP | {"store_grace_minutes": 0.01})
    with pytest.raises(
        InfrastructureError, match=r"longer than the grace period of .* rerun the same command on this machine"
    ):
        run_training(given_up.uri, At({6: server.stop}))
    server.start()
    known = given_up.checkpointed_step()
    assert 0 < known < 12
    capsys.readouterr()
    assert run_training(given_up.uri, StopRequest()) == 0
    output = capsys.readouterr().out
    (resumed,) = given_up.store.get_json(f"{given_up.uri}/training/summary.json")["resumes"]
    assert resumed > known
    assert f"resuming from step {resumed} of 12 (checkpoint {server.directory}/pending/" in output
    assert given_up.weights() == whole.weights()
    assert [line["step"] for line in read_log(given_up.store, given_up.uri)] == list(range(1, 13))
