"""A run with a micro network, on images made here."""

from __future__ import annotations

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
from PIL import Image

from esvit_core.config import Config, DataConfig
from esvit_core.data.ingest.prepare import prepare
from esvit_core.data.loading.loader import TrainLoader
from esvit_core.launch.stop import StopRequest
from esvit_core.storage import ObjectStore
from esvit_core.training.distributed.processes import World
from esvit_core.training.state import Parts, assemble

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
def assembled() -> Callable[..., Parts]:
    """The parts of a micro training whose epochs are one step, without data: ``assembled(optimizer={...})``."""

    def assemble_micro(**sections: dict[str, Any]) -> Parts:
        config = Config.from_mapping({**MICRO, **{name: MICRO.get(name, {}) | part for name, part in sections.items()}})
        loader = cast(TrainLoader, SimpleNamespace(steps_per_epoch=1))
        return assemble(config, World(0, 1, torch.device("cpu"), None), loader)

    return assemble_micro


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """A training makes torch deterministic for the whole process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


class StopAfter(StopRequest):
    """Asked to stop when it has been looked at ``steps`` times."""

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
    """64 images of 20 px in one folder: 4 steps an epoch."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(64):
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((20, 20), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@dataclass
class MicroRun:
    """A run in the store, and the means to start it in a process of its own."""

    uri: str
    store: ObjectStore
    config: Config
    launched: list[subprocess.Popen[str]] = field(default_factory=list)

    def launch(self) -> subprocess.Popen[str]:
        """``launch_training`` in another process, which can be signalled."""
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

    def processes(self, what: str = "") -> list[psutil.Process]:
        """The agent and the training processes of this run that are alive: those with ``what`` in their command."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            command = " ".join(process.info["cmdline"] or [])
            alive = process.info["status"] != psutil.STATUS_ZOMBIE
            if alive and f"--run-uri {self.uri}" in command and what in command:
                found.append(process)
        return found

    def trainers(self) -> list[psutil.Process]:
        return [process for process in self.processes() if "launch.agent" not in " ".join(process.cmdline())]

    def checkpointed_step(self) -> int:
        pointer = self.store.read_pointer(f"{self.uri}/training/latest")
        return pointer.value["step"] if pointer else -1

    def wait_for_step(self, step: int) -> None:
        """Until there is a checkpoint of ``step`` or later."""
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
            process.wait()
        for left in run.processes():
            left.kill()
