"""Fixtures for the tests of components and pipelines: a small finished run, made once through the command line."""

from __future__ import annotations

import functools
import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp_rules
import numpy as np
import psutil
import pytest
import slow_tests
from PIL import Image

from esvit_core.runs.run import Run, open_run
from esvit_core.storage.address import VARIABLES
from esvit_core.storage.embedded import EmbeddedStore
from esvit_pipelines.local.step_server import step_server

if not any(Path("/dev").glob("nvidia[0-9]*")):
    # Triton reads this variable when it is imported. Without a GPU, its kernels run in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

MICRO_RECIPE = """# A network that trains in seconds.
recipe: micro
data: {val_fraction: 0.25}
augment:
  global_crops: {size: 32, number: 2, scale: [0.4, 1.0]}
  local_crops: {size: 16, number: 2, scale: [0.05, 0.4]}
model: {arch: swin, patch_size: 4, embed_dim: 16, depths: [1, 1], num_heads: [2, 2], window_size: 4, drop_path: 0.0}
head: {out_dim: 64, hidden_dim: 32, bottleneck_dim: 16}
objective: {warmup_teacher_temp_epochs: 0}
optimizer: {lr: 0.004, warmup_epochs: 0, teacher_momentum: 0.9}
training: {epochs: 2, batch_size: 8, processes: 1, checkpoint_steps: 4, log_steps: 1, precision: float32}
evaluation:
  resize: 36
  crop: 32
  batch_size: 16
  knn_k: [1, 5]
  linear: {epochs: 2, batch_size: 16, last_blocks: 2}
  visualization: 1
  correspondence_images: 4
promotion: {metric: knn/5}
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-slow", action="store_true", help="rewrite tests/slow-tests.txt from this run")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-slow") and not hasattr(config, "workerinput"):
        known = slow_tests.listed() if _leaves_out_slow(config) else frozenset()
        config.pluginmanager.register(slow_tests.Recorder(known))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """Collect no garbage while the tests are imported, and keep what they imported out of later collections."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def _leaves_out_slow(config: pytest.Config) -> bool:
    return bool(config.getoption("markexpr") == "not slow")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import a file whose tests are all slow and not wanted."""
    if not _leaves_out_slow(config) or not collection_path.is_relative_to(config.rootpath):
        return None
    return collection_path.relative_to(config.rootpath).as_posix() in slow_tests.listed() or None


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests and those of the finished run, give the latter time to wait for it, and begin with long files.

    pytest-xdist hands out files in this order, so that no process is left with a long one at the end.
    """
    items.sort(key=_expected_length)
    listed = slow_tests.listed()
    for item in items:
        function = slow_tests.function_of(item.nodeid)
        waits = "finished_run" in getattr(item, "fixturenames", ())
        if waits or function in listed or function.partition("::")[0] in listed:
            item.add_marker(pytest.mark.slow)
        if waits:
            item.add_marker(pytest.mark.timeout(900))


def _expected_length(item: pytest.Item) -> int:
    """Rank of an item's file: finished run, other runs, trainings and exports, long single ones, all others.

    Tests of the store wait more than they compute; they begin early, beside those that keep the processors busy.
    """
    folder = item.path.parent.relative_to(item.config.rootpath).as_posix()
    if _uses_finished_run(item.path):
        return 0
    return {"tests/storage": 1, "tests/pipelines": 1, "tests/training": 2, "tests/formats": 2, "tests": 3}.get(
        folder, 4
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run the tests of each file in one process of pytest-xdist, and all files that use the finished run in the same one.

    Otherwise each process would make a finished run of its own. ``--dist loadgroup`` is no help: pytest-xdist 3.8 adds
    the group to the test's id, which pytest 9.2 does not allow.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "finished_run" if _uses_finished_run(config.rootpath / path) else path

    return ByFile(config, log)


@functools.cache
def _uses_finished_run(path: Path) -> bool:
    return bool(re.search(r"\b(finished_run|finished_store|run_there)\b", path.read_text(encoding="utf-8")))


def draw_image(kind: int, number: int, size: int = 40) -> Image.Image:
    """Draw an image whose class determines the direction and the colour of its stripes."""
    rng = np.random.default_rng((kind, number))
    rows, columns = np.mgrid[:size, :size]
    wave = np.sin((rows * np.cos(kind) + columns * np.sin(kind)) * (0.4 + 0.2 * kind) + rng.uniform(0, 6))
    colour = np.roll([220, 120, 40], kind) + rng.integers(-20, 20, 3)
    pixels = 128 + (wave[..., None] * (colour - 128)) + rng.normal(0, 8, (size, size, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_folder(folder: Path, classes: Sequence[str], per_class: int) -> Path:
    """Draw images into one folder per class; the images of a class named "" go into ``folder`` itself."""
    for kind, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            draw_image(kind, number).save(folder / name / f"{kind}-{number:03}.png")
    return folder


def draw_archive(path: Path, classes: Sequence[str], per_class: int) -> Path:
    """Draw the same images into a zip."""
    folder = draw_folder(path.with_suffix(""), classes, per_class)
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
    return path


def run_esvit(*arguments: Any, cwd: Path | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, without another test's store in the environment."""
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES} | more.pop("env", {})
    return subprocess.run(
        [sys.executable, "-m", "esvit_pipelines", *map(str, arguments)],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=more.pop("timeout", 800),
        **more,
    )


@dataclass(frozen=True)
class FinishedRun:
    """The finished run of the session.

    Args:
        folder: the working directory, with ``images/``, ``marks.zip`` and ``micro.yaml``.
        arguments: arguments of the command.
        output: standard output of the command.
        seconds: duration of the command.
        name: run id.
        commands: command lines of all processes on this machine during the run.
    """

    folder: Path
    arguments: tuple[str, ...]
    output: str
    seconds: float
    name: str
    commands: frozenset[str]

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def here(self) -> Path:
        return self.out / self.name

    @property
    def uri(self) -> str:
        return f"s3://esvit/runs/{self.name}"


class Images:
    """Draws test images."""

    folder = staticmethod(draw_folder)
    archive = staticmethod(draw_archive)


@pytest.fixture(scope="session")
def images() -> Images:
    """Draws test images: ``images.folder(path, classes, per_class)``, ``images.archive(...)``."""
    return Images()


@pytest.fixture(scope="session")
def esvit() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line: ``esvit("run", "--data", ...)``."""
    return run_esvit


@pytest.fixture(scope="session")
def micro_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for a network that trains in seconds."""
    path = tmp_path_factory.mktemp("recipe") / "micro.yaml"
    path.write_text(MICRO_RECIPE, encoding="utf-8")
    return path


@contextmanager
def command_lines() -> Iterator[set[str]]:
    """Collect the command lines of all processes in the meantime, as every user of the machine can read them."""
    commands: set[str] = set()
    end = threading.Event()

    def collect() -> None:
        while not end.wait(0.1):
            commands.update(" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    try:
        yield commands
    finally:
        end.set()
        thread.join()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Run `esvit run` on labelled images with one transfer set, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("a run")
    draw_folder(folder / "images", ["lines", "waves", "bars"], 16)
    draw_archive(folder / "marks.zip", ["one", "two"], 12)
    (folder / "micro.yaml").write_text(MICRO_RECIPE, encoding="utf-8")
    arguments = ("run", "--data", "images", "--recipe", "micro.yaml", "--transfer", "marks=marks.zip", "--out", "out")
    start = time.monotonic()
    with command_lines() as commands:
        done = run_esvit(*arguments, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (here,) = folder.glob("out/micro-*")
    return FinishedRun(folder, arguments, done.stdout, time.monotonic() - start, here.name, frozenset(commands))


@pytest.fixture(scope="session")
def finished_store(finished_run: FinishedRun) -> Iterator[EmbeddedStore]:
    """A server on the data of the finished run."""
    server = EmbeddedStore(finished_run.out / "store")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def run_there(finished_run: FinishedRun, finished_store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The finished run, with its store in the environment, from its working directory."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in finished_store.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(finished_run.folder)
    return open_run(finished_run.uri)


class ComponentRunner:
    """Calls a component directly and through kfp.local, and checks its outputs against Kubeflow's rules."""

    def __init__(self, folder: Path, server_path: str) -> None:
        self.folder, self.server_path = folder, server_path

    def directly(self, component: Any, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        """Call the function with new output artifacts, and return its result and the artifacts by name."""
        from kfp import dsl
        from kfp.dsl.types import type_annotations

        artifacts = {}
        for name, annotation in component.python_func.__annotations__.items():
            if name == "return" or not type_annotations.is_Input_Output_artifact_annotation(annotation):
                continue
            kind = type_annotations.get_io_artifact_class(annotation)
            if type_annotations.is_artifact_wrapped_in_Output(annotation):
                artifacts[name] = kind(name=name, uri=str(self.folder / name))
            else:
                arguments.setdefault(name, kind(name=name, uri="s3://esvit/unused"))
        assert all(isinstance(artifact, dsl.Artifact) for artifact in artifacts.values())
        returned = component.python_func(**arguments, **artifacts)
        assert not kfp_rules.refused(kfp_rules.executor_output(component, returned, artifacts))
        for name in artifacts:  # without a file, the UI's preview of an artifact fails
            assert (self.folder / name).is_file(), f"{name} has no content"
        return returned, artifacts

    def through_kfp(self, component: Any, **arguments: Any) -> dict[str, Any]:
        """Run the component alone in a pipeline with kfp.local, and return the outputs by name."""
        from kfp import dsl, local
        from kfp.dsl.types import type_annotations

        spec = component.component_spec
        kinds = {
            name: type_annotations.get_io_artifact_class(annotation)
            for name, annotation in component.python_func.__annotations__.items()
            if name in (spec.inputs or {}) and type_annotations.is_Input_Output_artifact_annotation(annotation)
        }

        def alone():  # unannotated: kfp would read an annotation as an output
            made = {
                name: dsl.importer(artifact_uri="s3://esvit/unused", artifact_class=kind).output
                for name, kind in kinds.items()
            }
            component(**arguments, **made)

        local.init(
            runner=local.SubprocessRunner(use_venv=False),
            pipeline_root=str(self.folder / "kfp"),
            workspace_root=str(self.folder / "workspace"),
        )
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.setenv("PATH", self.server_path)
            patch.setattr(sys, "executable", "python3")
            warnings.simplefilter("ignore")  # an image that is not named python, and the limits of importers
            dsl.pipeline(name="alone")(alone)()
        (written,) = self.folder.glob(f"kfp/*/{component.name}/executor_output.json")
        text = written.read_text(encoding="utf-8")
        assert not kfp_rules.refused(text)
        found = json.loads(text)
        artifacts = {name: value["artifacts"][0] for name, value in found.get("artifacts", {}).items()}
        return {**found.get("parameterValues", {}), **artifacts}


@pytest.fixture(scope="session")
def server_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A search path on which ``python3`` runs steps in forks of a server, as `esvit run` does."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # the server sets both for its own process, the runner
            patch.setattr(sys, "executable", sys.executable)
            patch.setenv("PATH", os.environ["PATH"])
            stack.enter_context(step_server(tmp_path_factory.mktemp("steps")))
            path = os.environ["PATH"]
        yield path


@pytest.fixture
def components(tmp_path: Path, server_path: str) -> ComponentRunner:
    """Calls components directly and through kfp.local."""
    return ComponentRunner(tmp_path, server_path)
