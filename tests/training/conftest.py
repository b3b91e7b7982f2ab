"""Fixtures: a run with a micro network on generated images."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import pytest
import torch
from forked import TRAINING, Forked
from PIL import Image

from esvit_core.config import Config, DataConfig
from esvit_core.data.ingest.prepare import prepare
from esvit_core.data.loading.loader import TrainLoader
from esvit_core.launch.signals import RENDEZVOUS_VARIABLE, StopRequest
from esvit_core.storage import ObjectStore
from esvit_core.training.distributed.processes import World
from esvit_core.training.state import TrainState, assemble_train_state

CPU = torch.device("cpu")
MICRO: dict[str, Any] = {
    "recipe": "micro",
    "augment": {
        "global_crops": {"size": 16, "number": 2, "scale": (0.4, 1.0)},
        "local_crops": {"size": 8, "number": 2, "scale": (0.05, 0.4)},
    },
    "model": {
        "arch": "swin",
        "patch_size": 2,
        "embed_dim": 16,
        "depths": (1, 1),
        "num_heads": (1, 2),
        "window_size": 4,
        "drop_path": 0.2,
    },
    "head": {"out_dim": 64, "hidden_dim": 32, "bottleneck_dim": 16},
    "optimizer": {"warmup_epochs": 1},
    "training": {"epochs": 3, "batch_size": 16, "checkpoint_steps": 5, "log_steps": 2},
}


@pytest.fixture
def assembled() -> Callable[..., TrainState]:
    """Build the state of a micro training without data, with epochs of one step: ``assembled(optimizer={...})``.

    Its networks are on the CPU unless a device is passed first.
    """

    def assemble_micro(device: torch.device = CPU, **sections: dict[str, Any]) -> TrainState:
        config = Config.from_mapping(
            {**MICRO, **{name: MICRO.get(name, {}) | section for name, section in sections.items()}}
        )
        loader = cast(TrainLoader, SimpleNamespace(steps_per_epoch=1))
        return assemble_train_state(config, World(0, 1, device, None), loader)

    return assemble_micro


class StopAfter(StopRequest):
    """Requests a stop after ``requested`` has been read ``steps`` times."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    @property
    def requested(self) -> bool:
        self.steps -= 1
        return self.steps < 0


@pytest.fixture
def stop_after() -> Callable[[int], StopRequest]:
    return StopAfter


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 images of 20 px in one folder: 4 steps per epoch."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(64):
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((20, 20), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@dataclass
class MicroRun:
    """A run in the store, which can be launched in another process."""

    uri: str
    store: ObjectStore
    config: Config
    launched: list[Forked | subprocess.Popen[str]] = field(default_factory=list)

    def launch(self) -> subprocess.Popen[str]:
        """Call ``launch_training`` in another process, which can receive signals."""
        code = (
            "from esvit_core.errors import step\n"
            "from esvit_core.runs.run import open_run\n"
            "from esvit_core.launch.launcher import launch_training\n"
            f"run = open_run({self.uri!r})\n"
            "with step('pretrain'):\n"
            "    launch_training(run.uri, run.config)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.launched.append(process)
        return process

    def train(self, folder: Path) -> list[str]:
        """Train in as many processes as the run has, without a launcher, and return what each printed.

        Args:
            folder: an empty folder, in which the processes meet.
        """
        processes = self.config.training.processes
        assert isinstance(processes, int)
        environment = os.environ | {"WORLD_SIZE": str(processes), RENDEZVOUS_VARIABLE: str(folder)}
        workers = [
            Forked(TRAINING, "--run", self.uri, environment=environment | {"RANK": str(rank)})
            for rank in range(processes)
        ]
        printed = [worker.communicate(timeout=240) for worker in workers]
        assert [worker.returncode for worker in workers] == [0] * processes, printed
        return [output for output, _ in printed]

    def processes(self, text: str = "") -> list[psutil.Process]:
        """Return the live agent and training processes of this run that have ``text`` in their command line."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            command = " ".join(process.info["cmdline"] or [])
            alive = process.info["status"] != psutil.STATUS_ZOMBIE
            if alive and f"--run-uri {self.uri}" in command and text in command:
                found.append(process)
        return found

    def trainers(self) -> list[psutil.Process]:
        return [process for process in self.processes() if "launch.agent" not in " ".join(process.cmdline())]

    def checkpointed_step(self) -> int:
        pointer = self.store.read_pointer(f"{self.uri}/training/latest")
        return pointer.value["step"] if pointer else -1

    def wait_for_step(self, step: int) -> None:
        """Wait for a checkpoint of ``step`` or later."""
        self.wait_until(lambda: self.checkpointed_step() >= step, f"a checkpoint of step {step}")

    @staticmethod
    def wait_until(condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds} s for {what}"
            time.sleep(0.05)

    def weights(self) -> str:
        """SHA-256 of the trained backbone's weights."""
        manifest = self.store.read_manifest(f"{self.uri}/backbone")
        assert manifest is not None
        return manifest["files"]["model.safetensors"]["sha256"]


@pytest.fixture
def micro_run(store_env: Any, images: Path) -> Iterator[Callable[..., MicroRun]]:
    """Make a run: ``micro_run("name", objective={"teacher_temp": 0.05})``."""
    made: list[MicroRun] = []

    def make(name: str, **sections: dict[str, Any]) -> MicroRun:
        values = {**MICRO, "bucket": store_env.bucket}
        for section, changes in sections.items():
            values[section] = {**values.get(section, {}), **changes}
        config = Config.from_mapping(values)
        uri = store_env.uri(f"runs/{name}")
        store_env.put_bytes(f"{uri}/config.yaml", config.to_yaml().encode())
        prepare(str(images), store_env, f"{uri}/data", DataConfig(val_fraction=0.0))
        made.append(MicroRun(uri, store_env, config))
        return made[-1]

    yield make
    for run in made:
        for process in run.launched:
            process.kill()
            process.wait(60)
        for left in run.processes():
            left.kill()
