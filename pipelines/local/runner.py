"""Run a pipeline with kfp.local: the process that `esvit run`, `retrain` and `evaluate` start.

The process leads a session of its own. A Ctrl-C in the terminal reaches only the command line, which forwards it once;
this process keeps relaying the steps' output until the last step has saved its state and ended.

    python -m esvit_pipelines.local.runner request.json
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esvit_core.launch.signals import outlive_signals
from esvit_pipelines.local.step_client import STOPPED
from esvit_pipelines.local.step_server import step_server

if TYPE_CHECKING:
    from esvit_core.config import Config


@dataclass(frozen=True)
class Request:
    """A pipeline run to execute.

    Args:
        data: source of the images.
        config: file with the resolved configuration; for a retraining or an evaluation, with the requested one.
        run_uri: address of the run in the object store.
        work: folder for this attempt only, to which ``outcome.json`` is written.
        log: file to which every line is written.
        owner: owner of the retraining's lease; None: the run is not a retraining.
        backbone: the existing backbone that the run evaluates; None: it trains one.
        finished: the run has its report, so that the steps only find their results.
    """

    data: str
    config: str
    run_uri: str
    work: str
    log: str
    owner: str | None = None
    backbone: str | None = None
    finished: bool = False

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Args:
        finished: every step succeeded.
        step: the step that failed, or None.
        error: last line of its traceback; empty: there is none.
    """

    finished: bool
    step: str | None = None
    error: str = ""

    @classmethod
    def read(cls, work: Path) -> Outcome:
        """Read the outcome of the attempt in ``work``; an attempt without one did not finish."""
        try:
            return cls(**json.loads((work / "outcome.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls(False)

    def write(self, work: Path) -> None:
        temporary = work / "outcome.json.part"
        temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")
        temporary.replace(work / "outcome.json")


def main(arguments: list[str]) -> int:
    request = Request(**json.loads(Path(arguments[0]).read_text(encoding="utf-8")))
    work = Path(request.work)
    programs = work / "bin"
    programs.mkdir()
    # The steps get the same signals, and this process ends after them. Between two steps, nobody else gets a signal.
    stopped = programs / STOPPED
    outlive_signals(on_signal=stopped.touch)
    _stop_when_parent_ends(stopped)
    with step_server(programs, request.finished):
        outcome = run_steps(request)
    outcome.write(work)
    return 0 if outcome.finished else 1


def run_steps(request: Request) -> Outcome:
    """Run all steps of the pipeline, one after the other."""
    import logging

    from kfp import local

    from esvit_core.config import Config
    from esvit_pipelines.local.step_console import KfpRecords, StepConsole
    from esvit_pipelines.steps import step_names

    # kfp warns about images whose name lacks "python"; ours contains Python nevertheless.
    warnings.filterwarnings("ignore", message="You may be attemping to run a task", category=RuntimeWarning)
    config = Config.from_yaml(Path(request.config).read_text(encoding="utf-8"))
    pipeline, arguments = _define(request, config)
    screen = sys.stdout
    # Unbuffered: a write that failed on a full disk is not repeated when the file is closed.
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
        except RuntimeError as error:  # kfp.local raises it when a step failed
            console.record(str(error))
            return Outcome(False, console.step, console.last_error)
        finally:
            sys.stdout = screen
            logging.getLogger().removeFilter(records)
    return Outcome(True)


def _define(request: Request, config: Config) -> tuple[Any, dict[str, str]]:
    """Return the pipeline and its arguments besides the images; its parameters' defaults hold the configuration."""
    if request.owner is not None:
        from esvit_pipelines.retrain.pipeline import build_retrain_pipeline

        return build_retrain_pipeline(config, owner=request.owner), {}
    if request.backbone is not None:
        from esvit_pipelines.evaluate.pipeline import build_evaluate_pipeline

        return build_evaluate_pipeline(config), {"run_uri": request.run_uri, "backbone": request.backbone}
    from esvit_pipelines.pretrain.pipeline import build_pretrain_pipeline

    return build_pretrain_pipeline(config), {"run_uri": request.run_uri}


def _stop_when_parent_ends(stopped: Path) -> None:
    """End the steps when the command line ends, which holds the other end of this process's standard input.

    Args:
        stopped: file that is written first, so that no further step starts.
    """
    pipe = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # for the steps, which read no input
    os.close(null)

    def watch() -> None:
        while os.read(pipe, 4096):
            pass
        stopped.touch()
        os.killpg(os.getpgid(0), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="command line").start()


def environment(base: Mapping[str, str], work: Path, error_file: Path) -> dict[str, str]:
    """Return the environment of the runner and the steps: ``base`` and the paths to write to."""
    from esvit_core.errors import ERROR_FILE_VARIABLE

    temporary = work / "tmp"
    temporary.mkdir()
    return {
        **base,
        ERROR_FILE_VARIABLE: str(error_file),
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # a user's file called torch.py must not be imported instead of PyTorch
        "TMPDIR": str(temporary),  # kfp.local leaves a folder per step there
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
