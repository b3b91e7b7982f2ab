"""Runs a pipeline with kfp.local: the process that `esvit run` and `esvit retrain` start.

It is the head of a session of its own. A Ctrl-C in the terminal reaches only the command line, which passes it on
once; this process goes on relaying the steps' lines until the last of them has saved its state and ended.

    python -m esvit_pipelines.local.runner request.json
"""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esvit_core.config import Config


@dataclass(frozen=True)
class Request:
    """What to run.

    Args:
        data: the images.
        config: file with the resolved configuration; of a retraining, with the one that was asked for.
        run_uri: where the run lies in the object store.
        work: folder for this attempt only; gets ``outcome.json``.
        log: file that gets every line.
        owner: of a retraining; None: the run is none.
    """

    data: str
    config: str
    run_uri: str
    work: str
    log: str
    owner: str | None = None

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


@dataclass(frozen=True)
class Outcome:
    """How it ended.

    Args:
        finished: every step succeeded.
        step: the step that failed, or None.
        error: last line of its traceback, if it left one.
    """

    finished: bool
    step: str | None = None
    error: str = ""

    @classmethod
    def read(cls, work: Path) -> Outcome:
        """Of the attempt in ``work``; an attempt that left none did not finish."""
        try:
            return cls(**json.loads((work / "outcome.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls(False)

    def write(self, work: Path) -> None:
        temporary = work / "outcome.json.part"
        temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")
        temporary.replace(work / "outcome.json")


def main(arguments: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave_to_the_steps)
    _stop_with_the_command_line()
    request = Request(**json.loads(Path(arguments[0]).read_text(encoding="utf-8")))
    work = Path(request.work)
    _interpreter_for_steps(work / "bin")
    outcome = run_pipeline(request)
    outcome.write(work)
    return 0 if outcome.finished else 1


def run_pipeline(request: Request) -> Outcome:
    """Run every step of the pipeline, one after the other, and say how it ended."""
    import logging

    from kfp import local

    from esvit_core.config import Config
    from esvit_pipelines.local.step_console import KfpRecords, StepConsole
    from esvit_pipelines.steps import step_names

    # The runner takes an image whose name lacks "python" for one without Python; ours has it.
    warnings.filterwarnings("ignore", message="You may be attemping to run a task", category=RuntimeWarning)
    config = Config.from_yaml(Path(request.config).read_text(encoding="utf-8"))
    pipeline, arguments = _define(request, config)
    screen = sys.stdout
    # Without a buffer: what could not be written to a full disk is not tried again when the file is closed.
    with io.TextIOWrapper(Path(request.log).open("ab", buffering=0), encoding="utf-8", write_through=True) as log:
        console = StepConsole(step_names(pipeline), screen, log)
        records = KfpRecords(console)
        local.init(
            runner=local.SubprocessRunner(use_venv=False),
            pipeline_root=str(Path(request.work) / "kfp"),
            workspace_root=str(Path(request.work) / "workspace"),
        )
        logging.getLogger().addFilter(records)
        sys.stdout = console
        try:
            pipeline(data=request.data, **arguments)
        except RuntimeError as error:  # how kfp.local tells that a step failed
            console.record(str(error))
            return Outcome(False, console.step, console.last_error)
        finally:
            sys.stdout = screen
            logging.getLogger().removeFilter(records)
    return Outcome(True)


def _define(request: Request, config: Config) -> tuple[Any, dict[str, str]]:
    """The pipeline, and what it is given besides the images; the defaults of its parameters say the configuration."""
    if request.owner is not None:
        from esvit_pipelines.retrain.pipeline import build_retrain_pipeline

        return build_retrain_pipeline(config, owner=request.owner), {}
    from esvit_pipelines.pretrain.pipeline import build_pretrain_pipeline

    return build_pretrain_pipeline(config), {"run_uri": request.run_uri}


def _interpreter_for_steps(folder: Path) -> None:
    """Let kfp.local start the steps with this Python, wherever it and the images lie.

    The runner writes ``sys.executable`` over every ``python3`` in a step's command, without quotes, and that includes
    the arguments: a path with a space, or images below a folder with "python3" in its name, would break. With an
    interpreter of that very name on the search path the replacement changes nothing.
    """
    folder.mkdir(parents=True)
    wrapper = folder / "python3"
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
    wrapper.chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    sys.executable = "python3"


def _stop_with_the_command_line() -> None:
    """End the steps when the command line is gone: it holds the other end of this process's standard input."""
    mine = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # the steps read nothing
    os.close(nothing)

    def watch() -> None:
        while os.read(mine, 4096):
            pass
        os.killpg(os.getpgid(0), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="command line").start()


def _leave_to_the_steps(number: int, frame: FrameType | None) -> None:
    """The steps get the same signal; this process ends after them."""


def environment(base: Mapping[str, str], work: Path, error_file: Path) -> dict[str, str]:
    """What the runner and the steps see: ``base``, and where to write."""
    from esvit_core.errors import ERROR_FILE_VARIABLE

    temporary = work / "tmp"
    temporary.mkdir()
    return {
        **base,
        ERROR_FILE_VARIABLE: str(error_file),
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # a file of the user's that is called torch.py is not PyTorch
        "TMPDIR": str(temporary),  # kfp.local leaves a folder a step there
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
