"""Worker processes that die, hang, or lack shared memory end the training with the reason."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from esvit_core.config import Config
from esvit_core.data.loading import workers
from esvit_core.data.loading.loader import TrainLoader
from esvit_core.data.loading.sampler import epoch_order
from esvit_core.errors import InfrastructureError, UserError

RECIPE = {
    "augment": {
        "global_crops": {"size": 32, "number": 2, "scale": (0.4, 1.0)},
        "local_crops": {"size": 16, "number": 2, "scale": (0.05, 0.4)},
    },
    "training": {"workers": 2, "batch_size": 64, "store_grace_minutes": 0},
}
BATCH_BYTES = 64 * 3 * 4 * 2 * (32**2 + 16**2)
ROOT = Path(__file__).parents[2]


class Images:
    """Sixteen batches; a worker that loads image ``index`` does what ``happens`` says."""

    shard_sizes = (1024,)
    weights = None

    def __init__(self, index: int = -1, happens=None) -> None:
        self.index, self.happens, self.parent = index, happens, os.getpid()

    def __len__(self) -> int:
        return 1024

    def image(self, index: int) -> np.ndarray:
        if index == self.index and os.getpid() != self.parent:
            self.happens()
        return np.full((32, 32, 3), index % 256, np.uint8)


def loader(dataset: Images) -> TrainLoader:
    return TrainLoader(dataset, Config.from_mapping(RECIPE), seed=0)


def end(number: int):
    return lambda: os.kill(os.getpid(), number)


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, r"killed by SIGKILL \(out of memory\?\): lower training.workers"),
        (signal.SIGSEGV, r"killed by SIGSEGV: lower training.workers"),
        (signal.SIGBUS, r"killed by SIGBUS \(/dev/shm is full\?\): lower training.workers"),
    ],
)
def test_a_worker_that_is_killed_ends_the_training_with_the_reason(number: signal.Signals, reason: str) -> None:
    before = children()
    with pytest.raises(InfrastructureError, match=reason):
        for _ in loader(Images(500, end(number))).epoch(0):
            pass
    assert children() == before


def test_the_death_of_a_worker_is_raised_while_waiting_and_not_during_a_step(tmp_path: Path) -> None:
    """torch would raise it wherever the training happens to be."""
    in_a_step = tmp_path / "in-a-step"

    def happens() -> None:
        while not in_a_step.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    second_batch = epoch_order(0, 0, Images.shard_sizes)[64:128]
    batches = loader(Images(int(second_batch[0]), happens)).epoch(0)
    next(batches)
    in_a_step.touch()
    while not workers_have_died():
        time.sleep(0.05)  # a step
    with pytest.raises(InfrastructureError, match="SIGKILL"):
        list(batches)


@pytest.mark.parametrize("seen", [False, True], ids=["unseen", "seen by the signal handler"])
@pytest.mark.parametrize("error", [ConnectionResetError, FileNotFoundError, EOFError])
def test_a_worker_that_dies_while_it_hands_over_a_batch(
    error: type[Exception], seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = loader(Images())
    next(made.epoch(0))
    workers = made._worker_batches
    assert workers is not None

    def answer() -> None:
        raise error

    wait_for_an_exit = workers._wait_for_an_exit

    def wait() -> None:
        os.kill(workers._processes[0].pid or 0, signal.SIGKILL)
        if seen:
            time.sleep(0.2)  # the signal of its exit arrives here
        wait_for_an_exit()

    monkeypatch.setattr(workers, "_wait_for_an_exit", wait)

    with pytest.raises(InfrastructureError, match="killed by SIGKILL"):
        workers._wait(answer)


def workers_have_died() -> bool:
    states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in children()]
    return "Z" in states


@pytest.mark.parametrize(
    "happens", [lambda: time.sleep(3600), lambda: os.kill(os.getpid(), signal.SIGSTOP)], ids=["waits", "is stopped"]
)
def test_a_worker_that_hangs_ends_the_training(happens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "TIMEOUT_SECONDS", 3)
    before = children()
    with pytest.raises(InfrastructureError, match=r"no batch for .* a worker hangs; set training.workers to 0"):
        list(loader(Images(500, happens)).epoch(0))
    assert children() == before


def test_an_error_in_a_worker_arrives_as_it_was_raised() -> None:
    def happens() -> None:
        raise KeyError("an image without a name")

    with pytest.raises(KeyError, match="an image without a name"):
        list(loader(Images(500, happens)).epoch(0))


SMALL_MEMORY = """
import sys
sys.path[:0] = [{root!r}, {here!r}]
import test_workers
from esvit_core.errors import UserError
loader = test_workers.loader(test_workers.Images())
try:
    {call}
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "t", "/dev/shm"], capture_output=True).returncode != 0,
    reason="mounting a small /dev/shm needs root",
)
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("list(loader.epoch(0))", "training.workers: no shared memory for a batch of 1.9 MiB"),
        ("loader.check_shared_memory(1)", "need 9.4 MiB of shared memory, and 1.0 MiB are free in /dev/shm"),
    ],
    ids=["while training", "before"],
)
def test_too_little_shared_memory_is_a_one_line_error(call: str, expected: str) -> None:
    """Run in a separate mount namespace with a /dev/shm of 1 MiB."""
    script = SMALL_MEMORY.format(root=str(ROOT), here=str(Path(__file__).parent), call=call)
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "-", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert expected in done.stdout, done.stderr
    assert "enlarge /dev/shm (cluster.train.shared_memory; in Docker --shm-size)" in done.stdout
    assert done.stdout.count("\n") == 1 and "Traceback" not in done.stderr


def test_the_needed_shared_memory_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "free_shared_memory", lambda: 5 * 4 * BATCH_BYTES)
    line = loader(Images()).check_shared_memory(processes=4)  # each: 2 workers x 2 prefetched batches, and one in use
    assert (
        line == "data loading: 2 workers per process use up to 37.5 MiB of shared memory; 37.5 MiB are free in /dev/shm"
    )
    with pytest.raises(UserError, match=r"training\.workers 2"):
        loader(Images()).check_shared_memory(processes=5)


@pytest.mark.parametrize(
    ("processes", "cores", "batches", "expected"),
    [
        (1, 16, 100, 6),
        (1, 4, 100, 3),
        (8, 64, 8 * 13, 6),
        (8, 64, 8 * 12, 5),
        (8, 16, 1000, 1),
        (2, 2, 100, 0),
        (1, 9, 2, 0),
    ],
)
def test_auto_is_six_workers_per_gpu_as_far_as_cores_and_shared_memory_suffice(
    monkeypatch: pytest.MonkeyPatch, processes: int, cores: int, batches: int, expected: int
) -> None:
    monkeypatch.setattr(workers, "free_shared_memory", lambda: batches * BATCH_BYTES)
    auto = TrainLoader(Images(), Config.from_mapping(RECIPE | {"training": {"batch_size": 64}}), seed=0)
    assert auto.workers == 0  # on a CPU
    auto.use_workers_for_gpu(processes, cores)
    assert auto.workers == expected
    if expected:
        assert "shared memory" in auto.check_shared_memory(processes)  # and no error


def test_a_number_of_workers_is_used_on_a_gpu_too() -> None:
    given = loader(Images())
    given.use_workers_for_gpu(1, 64)
    assert given.workers == 2


def test_without_workers_no_shared_memory_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "free_shared_memory", lambda: 0)
    alone = Config.from_mapping(RECIPE | {"training": {"workers": 0, "batch_size": 64}})
    assert TrainLoader(Images(), alone, seed=0).check_shared_memory(1) == ""
