"""Fixtures of the tests of the cluster commands: a server that implements KFP's API, and the command line."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from kfp_server import KfpServer

from esvit_core.config import Config
from esvit_pipelines.cli import main
from esvit_pipelines.cluster.compile import compile_pipeline

VARIABLES = (
    "KF_PIPELINES_ENDPOINT",
    "KF_PIPELINES_UI_ENDPOINT",
    "KF_PIPELINES_SA_TOKEN_PATH",
    "KF_PIPELINES_DEFAULT_EXPERIMENT_NAME",
    "ESVIT_KFP_NAMESPACE",
    "ESVIT_KFP_CA_FILE",
    "ESVIT_KFP_COOKIE",
)
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session", autouse=True)
def fast_compilation() -> Iterator[None]:
    """Compile pipelines as fast as outside pytest, and load them with libyaml's parser, which KFP does not use.

    KFP calls ``inspect.stack()`` whenever a task is configured, to name a method in an error message. By default that
    reads the source of every frame and searches all modules for it, which takes seconds in a stack as deep as pytest's.
    """
    from kfp.dsl import pipeline_task, structures

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structures.yaml, "safe_load_all", functools.partial(yaml.load_all, Loader=loader))
        patch.setattr(pipeline_task, "inspect", SimpleNamespace(stack=functools.partial(inspect.stack, 0)))
        yield


@pytest.fixture(scope="module")
def running() -> Iterator[KfpServer]:
    made = KfpServer()
    yield made
    made.close()


@pytest.fixture
def server(running: KfpServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> KfpServer:
    """The server in its initial state; its address is in the environment."""
    running.reset()
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", running.url)
    monkeypatch.setenv("HOME", str(tmp_path))  # KFP's client keeps a file there
    return running


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled evaluate pipeline."""
    path = tmp_path_factory.mktemp("compiled") / "evaluate.yaml"
    compile_pipeline("evaluate", Config.load("demo"), path)
    return path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command line in this process, without a kubeconfig; returns exit code, stdout and stderr."""
    monkeypatch.setenv("KUBECONFIG", "/nowhere/kubeconfig")

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["esvit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        printed = capsys.readouterr()
        code = stop.value.code
        return (code if isinstance(code, int) else 0), printed.out, printed.err

    return run
