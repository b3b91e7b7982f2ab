"""Launch the training processes of a run and wait for them; on this machine: torchx, ``dist.ddp``, ``local_cwd``.

launcher (the pre-train step) -> agent (torch elastic) -> training processes. Each ends when the one before it ends,
however that happens; a stop asked of the launcher becomes a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

import psutil

import esvit_core
from esvit_core.config import Config
from esvit_core.errors import CRASH_EXIT_CODE, USER_ERROR_EXIT_CODE, InfrastructureError, UserError
from esvit_core.launch.agent import AGENT_MODULE, LAUNCHER_VARIABLE
from esvit_core.launch.interrupt import Signals, keep_signal_handlers
from esvit_core.launch.outcome import Outcome, conclude, family_of
from esvit_core.launch.stop import PROCESS_FILE_PREFIX, RENDEZVOUS_VARIABLE
from esvit_core.runs.environment import available_cores
from esvit_core.runs.training_summary import TrainingSummary, read_summary
from esvit_core.storage import ObjectStore

MODULE = "esvit_core.training"
SCHEDULER = "local_cwd"
STOP_SECONDS = 40.0  # a training process gives itself 25 s, the agent its processes 30 s
POLL_SECONDS = 0.1
ERROR_LINES = 40


def launch_training(run_uri: str, config: Config) -> TrainingSummary:
    """Train the run and wait for it; a run that is finished is found, one that was interrupted goes on.

    Prints what the first training process prints, as it comes.

    Args:
        run_uri: ``s3://bucket/runs/<id>``, with ``config.yaml`` and ``data/``; the store is that of ``ESVIT_S3_*``.
        config: the run's configuration.

    Raises:
        UserError, InfrastructureError, CrashError: the training failed; the text is the reason that the process which
            failed first gave.
        SystemExit: SIGINT or SIGTERM arrived (code 128 + signal). The training has been stopped with a checkpoint.
    """
    store = ObjectStore.from_env()
    if summary := read_summary(store, run_uri):
        print(f"train: already done; the backbone is at {summary.backbone}", flush=True)
        return summary
    if config.launch.scheduler != "local":
        from esvit_core.launch.kubernetes.follow import launch_on_cluster

        launch_on_cluster(store, run_uri, config)
    else:
        _launch_here(store, run_uri, config)
    if summary := read_summary(store, run_uri):
        return summary
    raise InfrastructureError(f"training of {run_uri}: ended without a summary; the same command again goes on")


def _launch_here(store: ObjectStore, run_uri: str, config: Config) -> None:
    processes, threads = divide_cores(config)
    many = "process" if processes == 1 else "processes"
    print(f"train: starting {processes} {many} with {threads} threads each", flush=True)
    with tempfile.TemporaryDirectory(prefix="esvit-train-", ignore_cleanup_errors=True) as folder:
        outcome = _run(run_uri, processes, threads, Path(folder))
    conclude(store, run_uri, outcome)


def divide_cores(config: Config) -> tuple[int, int]:
    """Processes on this machine, and threads of each: together they use every core once.

    ``training.processes`` "auto" is one per GPU, else one per core up to 2, and never more than divide the batch: the
    slowest process is the one with the largest share.
    """
    cores, batch_size, wanted = available_cores(), config.training.batch_size, config.training.processes
    if wanted == "auto":
        most = _gpus() or min(cores, 2)
        processes = next(n for n in range(most, 0, -1) if batch_size % n == 0)
    else:
        processes = wanted
    if batch_size < processes:
        raise UserError(
            f"training.batch_size {batch_size}: expected at least training.processes, {processes}; change one"
        )
    return processes, max(1, cores // processes)


def _run(run_uri: str, processes: int, threads: int, folder: Path) -> Outcome:
    from torchx.components.dist import ddp
    from torchx.runner import get_runner

    name = run_uri.rstrip("/").rsplit("/", 1)[-1]
    app = ddp("--run-uri", run_uri, m=MODULE, name=f"esvit/{name}", j=f"1x{processes}", cpu=threads * processes, tee=0)
    app.roles[0].env.update(_environment(threads, folder))
    _start_through_agent(app.roles[0], folder)
    with keep_signal_handlers(), get_runner() as runner:
        request = runner.dryrun(app, SCHEDULER, cfg={"log_dir": str(folder / "logs")})
        replica = request.request.role_params[app.roles[0].name][0]
        stop = Signals()  # after the scheduler has been made: it sets handlers of its own
        handle = runner.schedule(request)
        try:
            status = _wait(runner, handle, Path(replica.stdout), stop)
        finally:
            runner.cancel(handle)
            _end_processes(folder)
        return Outcome(stop.first) if stop.first else _explain(status, Path(replica.stderr))


def _environment(threads: int, folder: Path) -> dict[str, str]:
    environment = {
        "OMP_NUM_THREADS": str(threads),  # torchrun would set 1
        LAUNCHER_VARIABLE: str(os.getpid()),
        RENDEZVOUS_VARIABLE: str(folder),
        # The processes find this very package, whatever the working directory holds.
        "PYTHONPATH": os.pathsep.join(
            [str(Path(esvit_core.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "PYTHONSAFEPATH": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # it would listen on all interfaces
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic matrix products on GPUs
        "LOGLEVEL": "ERROR",
    }
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopback:
        environment["GLOO_SOCKET_IFNAME"] = loopback[0]
    return environment


def _start_through_agent(role: Any, folder: Path) -> None:
    """Replace ``bash -c "torchrun ..."`` by our agent with the same arguments, meeting in a file of ``folder``."""
    arguments = shlex.split(role.args[1])[1:]
    arguments[arguments.index("--rdzv_endpoint") + 1] = str(folder / "agents")
    role.entrypoint = sys.executable
    local = ["--rdzv_conf", "store_type=file", "--local_addr", "127.0.0.1"]
    role.args = ["-m", AGENT_MODULE, *local, *arguments]


def _wait(runner: Any, handle: str, stdout: Path, stop: Signals) -> Any:
    """Relay the output until the job has ended; its last status."""
    deadline = float("inf")
    with stdout.open(encoding="utf-8", errors="replace") as stream:
        while True:
            status = runner.status(handle)
            _relay(stream)
            if status is None or status.is_terminal():
                _relay(stream)
                return status
            if stop.first and deadline == float("inf"):
                deadline = time.monotonic() + STOP_SECONDS
                print("train: stopping, writing a checkpoint (once more: stop at once)", flush=True)
                for agent in _agents():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        # The training processes too: the agent would pass it on, but in a pod a second is all there is.
                        for process in (*agent.children(), agent):
                            process.terminate()
            if stop.count > 1 or time.monotonic() > deadline:
                for agent in _agents():
                    for process in (*agent.children(recursive=True), agent):
                        with contextlib.suppress(psutil.NoSuchProcess):
                            process.kill()
            stop.sleep(POLL_SECONDS)


def _relay(stream: TextIO) -> None:
    if text := stream.read():
        sys.stdout.write(text)
        sys.stdout.flush()


def _agents() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if AGENT_MODULE in child.cmdline():
                found.append(child)
    return found


def _end_processes(folder: Path) -> None:
    """Wait for training processes that have outlived their agent: they are writing their last checkpoint."""
    left = []
    for file in folder.glob(f"{PROCESS_FILE_PREFIX}*"):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(int(file.name.removeprefix(PROCESS_FILE_PREFIX)))
            if MODULE in process.cmdline():
                left.append(process)
    _, stubborn = psutil.wait_procs(left, timeout=STOP_SECONDS)
    for process in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _explain(status: Any, stderr: Path) -> Outcome:
    """The first failure in one line, if there is one.

    Where a process failed for a reason that only its traceback tells, that goes to the error output.
    """
    if status is not None and status.state.name == "SUCCEEDED":
        return Outcome()
    try:
        failure = json.loads(status.structured_error_msg)
        code, reason, rank = failure["exit_code"], failure["reason"], failure.get("rank")
    except (AttributeError, ValueError, KeyError):
        code, reason, rank = -signal.SIGKILL, "the agent of the training processes was killed", None
    if code == USER_ERROR_EXIT_CODE:
        return Outcome(reason=str(reason), rank=rank, exit_code=code)
    last_words = ""
    if family_of(code) == CRASH_EXIT_CODE:
        last_words = "\n".join(stderr.read_text(encoding="utf-8", errors="replace").splitlines()[-ERROR_LINES:])
        print(last_words, file=sys.stderr, flush=True)
    return Outcome(
        reason=f"training: {reason}; the same command again goes on from the last checkpoint",
        rank=rank,
        last_words=last_words,
        exit_code=family_of(code),
    )


def _gpus() -> int:
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return 0  # without the seconds that importing torch takes
    import torch

    return torch.cuda.device_count()
