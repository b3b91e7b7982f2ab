"""Fixtures of the tests of the cluster commands: a server that implements KFP's API, and the command line."""

from __future__ import annotations

import functools
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
from esvit_pipelines.cluster import compile as compile_module
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


def _caller() -> list[tuple[Any, ...]]:
    """Return the part of ``inspect.stack()`` that KFP reads: the name of the method that called its caller."""
    return [(), (None, None, None, sys._getframe(2).f_code.co_name)]


@pytest.fixture(scope="session", autouse=True)
def fast_compilation() -> Iterator[None]:
    """Compile pipelines as fast as outside pytest, and each one once; load them with libyaml's parser.

    KFP calls ``inspect.stack()`` whenever a task is configured, to name a method in an error message. That searches all
    modules for every frame without a file, such as those of pytest-xdist: two thirds of the time of a compilation.
    """
    from kfp.dsl import pipeline_task, structures

    texts: dict[tuple[str, str, Any], str] = {}
    compile_text = compile_module.pipeline_text

    def text(name: str, config: Config, form: Any = None) -> str:
        key = name, config.model_dump_json(), form
        if key not in texts:  # it depends on nothing else, see test_compile.py
            texts[key] = compile_text(name, config, form)
        return texts[key]

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_module, "pipeline_text", text)
        patch.setattr(structures.yaml, "safe_load_all", functools.partial(yaml.load_all, Loader=loader))
        patch.setattr(pipeline_task, "inspect", SimpleNamespace(stack=_caller))
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
