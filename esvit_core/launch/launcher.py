"""Launch the training processes of a run and wait for them; on this machine with torchx ``dist.ddp``, ``local_cwd``.

launcher (the pre-train step) -> agent (torch elastic) -> training processes. Each process ends when the one before it
ends for any reason. When the launcher is asked to stop, the training writes a checkpoint first.
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
from esvit_core.config.auto_choice import count
from esvit_core.errors import CRASH_EXIT_CODE, USER_ERROR_EXIT_CODE, InfrastructureError, UserError
from esvit_core.launch.agent import AGENT_MODULE, LAUNCHER_VARIABLE
from esvit_core.launch.outcome import Outcome, conclude, step_exit_code
from esvit_core.launch.signals import (
    LAUNCHER_SECONDS,
    PROCESS_FILE_PREFIX,
    RENDEZVOUS_VARIABLE,
    SignalCounter,
    restored_handlers,
)
from esvit_core.runs.environment import allocator_variables, available_cores
from esvit_core.runs.training_summary import TrainingSummary, read_summary
from esvit_core.storage import ObjectStore

MODULE = "esvit_core.training"
SCHEDULER = "local_cwd"
POLL_SECONDS = 0.1
ERROR_LINES = 40  # lines of a failed process's log to print


def launch_training(run_uri: str, config: Config) -> TrainingSummary:
    """Train the run and wait for it; a finished run returns at once, an interrupted one resumes.

    The output of rank 0 is printed as it comes.

    Args:
        run_uri: ``s3://bucket/runs/<id>``, with ``config.yaml`` and ``data/``; the store is that of ``ESVIT_S3_*``.
        config: the run's configuration.

    Raises:
        UserError, InfrastructureError, CrashError: the training failed; the message is the reason of the process that
            failed first.
        SystemExit: SIGINT or SIGTERM arrived (code 128 + signal); the training was stopped with a checkpoint.
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
    raise InfrastructureError(f"training of {run_uri}: ended without a summary; rerun the command to resume")


def _launch_here(store: ObjectStore, run_uri: str, config: Config) -> None:
    processes, threads = divide_cores(config)
    many = "process" if processes == 1 else "processes"
    print(f"train: starting {processes} {many} with {count(threads, 'thread')} each", flush=True)
    with tempfile.TemporaryDirectory(prefix="esvit-train-", ignore_cleanup_errors=True) as folder:
        outcome = _run(run_uri, processes, threads, Path(folder), allocator_variables(config.launch.allocator))
    conclude(store, run_uri, outcome)


def divide_cores(config: Config, use_gpus: bool = True) -> tuple[int, int]:
    """Return the number of processes on this machine and the threads of each; together they use every core once.

    ``training.processes`` "auto" is one per GPU, otherwise one per core up to 2. The number always divides the batch,
    because the process with the largest share would slow down the others.

    Args:
        config: configuration of the run.
        use_gpus: whether the processes may use this machine's GPUs.
    """
    cores, batch_size, wanted = available_cores(), config.training.batch_size, config.training.processes
    if wanted == "auto":
        most = (_gpus() if use_gpus else 0) or min(cores, 2)
        processes = next(n for n in range(most, 0, -1) if batch_size % n == 0)
    else:
        processes = wanted
    if batch_size < processes:
        raise UserError(
            f"training.batch_size {batch_size}: expected at least training.processes, {processes}; change one"
        )
    return processes, max(1, cores // processes)


def _run(run_uri: str, processes: int, threads: int, folder: Path, variables: dict[str, str]) -> Outcome:
    from torchx.components.dist import ddp
    from torchx.runner import get_runner

    name = run_uri.rstrip("/").rsplit("/", 1)[-1]
    app = ddp("--run-uri", run_uri, m=MODULE, name=f"esvit/{name}", j=f"1x{processes}", cpu=threads * processes, tee=0)
    app.roles[0].env.update(_environment(threads, folder) | variables)
    _start_through_agent(app.roles[0], folder)
    with restored_handlers(), get_runner() as runner:
        request = runner.dryrun(app, SCHEDULER, cfg={"log_dir": str(folder / "logs")})
        replica = request.request.role_params[app.roles[0].name][0]
        stop = SignalCounter()  # created after the scheduler, which sets its own handlers
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
        # The processes import this package, whatever the working directory contains.
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
    """Replace ``bash -c "torchrun ..."`` by our agent with the same arguments and a file in ``folder`` as rendezvous."""
    arguments = shlex.split(role.args[1])[1:]
    arguments[arguments.index("--rdzv_endpoint") + 1] = str(folder / "agents")
    role.entrypoint = sys.executable
    local = ["--rdzv_conf", "store_type=file", "--local_addr", "127.0.0.1"]
    role.args = ["-m", AGENT_MODULE, *local, *arguments]


def _wait(runner: Any, handle: str, stdout: Path, stop: SignalCounter) -> Any:
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
                deadline = time.monotonic() + LAUNCHER_SECONDS
                print("train: stopping, writing a checkpoint (signal again to stop at once)", flush=True)
                for agent in _agents():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        # Signal the training processes directly: in a pod there is no time for the agent to do so.
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
    """Wait for training processes that have outlived their agent, because they write their last checkpoint."""
    left = []
    for file in folder.glob(f"{PROCESS_FILE_PREFIX}*"):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(int(file.name.removeprefix(PROCESS_FILE_PREFIX)))
            if MODULE in process.cmdline():
                left.append(process)
    _, stubborn = psutil.wait_procs(left, timeout=LAUNCHER_SECONDS)
    for process in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _explain(status: Any, stderr: Path) -> Outcome:
    """Return the outcome with the first failure in one line.

    If only a traceback explains the failure, it is printed to standard error.
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
    log_tail = ""
    if step_exit_code(code) == CRASH_EXIT_CODE:
        log_tail = "\n".join(stderr.read_text(encoding="utf-8", errors="replace").splitlines()[-ERROR_LINES:])
        print(log_tail, file=sys.stderr, flush=True)
    return Outcome(
        reason=f"training: {reason}; rerun the command to resume from the last checkpoint",
        rank=rank,
        log_tail=log_tail,
        exit_code=step_exit_code(code),
    )


def _gpus() -> int:
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return 0  # avoids the import of torch, which takes seconds
    import torch

    return torch.cuda.device_count()
