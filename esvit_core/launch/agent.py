"""The agent: the process between the launcher and the training processes, which runs torch elastic's agent.

In addition it ends when the launcher dies, writes the reason of the first failure in one line where torchx or
Kubernetes reads it, and does not restart processes that failed because of a user error.
``python -m esvit_core.launch.agent`` takes torchrun's arguments.

Exit codes: 0 finished; 2 a mistake in the input; 75 an infrastructure failure, stopped from outside, or disconnected
from the other nodes: a restart continues; 1 the training processes crashed more often than ``--max-restarts``.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esvit_core.errors import USER_ERROR_EXIT_CODE
from esvit_core.launch.outcome import is_consequence
from esvit_core.launch.signals import RENDEZVOUS_VARIABLE, STOPPED_EXIT_CODE, end_with_parent, exit_on_sigterm
from esvit_core.runs.environment import available_cores

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

AGENT_MODULE = "esvit_core.launch.agent"
LAUNCHER_VARIABLE = "ESVIT_LAUNCHER_PID"
AGENT_VARIABLE = "ESVIT_AGENT_PID"
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"


def main(arguments: list[str]) -> int:
    """Run torchrun; return the exit code of the first process that failed, 0 if none failed."""
    if launcher := os.environ.get(LAUNCHER_VARIABLE):
        end_with_parent(int(launcher))
    if os.getpid() == 1:  # of a container; torch installs its handler later
        exit_on_sigterm()
    os.environ[AGENT_VARIABLE] = str(os.getpid())

    os.environ.setdefault("OMP_NUM_THREADS", str(_threads(arguments)))  # torchrun would set 1
    # With a shared store, a node that rejoins waits for an address that nobody writes (torch 2.14).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    gc.disable()  # collections take a sixth of the time of the imports
    import torch.distributed.run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    from esvit_core.torch_private import watch_failures

    gc.freeze()
    gc.enable()
    # torch exchanges failures between agents; this file passes the first failure to the launcher.
    error_file = os.environ.pop(ERROR_FILE_VARIABLE, None)
    if not watch_failures(_is_user_error):
        print("train: this version of torch restarts processes even after a user error", flush=True)
    try:
        torch.distributed.run.run(_with_host(torch.distributed.run.parse_args(arguments)))
        return 0
    except ChildFailedError as error:
        failure = first_failure(error)
    except SignalException as error:
        failure = _stopped(f"stopped from outside by {error.sigval.name}")
    except RendezvousError as error:
        failure = _stopped(f"disconnected from the other nodes: {_one_line(error)}")
    if launcher and os.getppid() != int(launcher):
        shutil.rmtree(os.environ[RENDEZVOUS_VARIABLE], ignore_errors=True)  # the launcher cannot do it any more
    elif error_file:
        Path(error_file).write_text(json.dumps(failure), encoding="utf-8")
    print(failure["reason"], file=sys.stderr, flush=True)
    return failure["exit_code"] if failure["exit_code"] > 0 else 1


def _threads(arguments: list[str]) -> int:
    """Return the threads of each process, so that all processes together use every core of the pod once."""
    processes = arguments[arguments.index("--nproc_per_node") + 1] if "--nproc_per_node" in arguments else "1"
    return max(1, available_cores() // int(processes))


def _with_host(options: Any) -> Any:
    """Make the node whose address is the endpoint's the host of the rendezvous store.

    torch would determine the host by resolving names, but the name of a pod may not resolve when it starts.
    """
    if options.local_addr and options.rdzv_backend == "c10d" and "store_type" not in options.rdzv_conf:
        host = options.rdzv_endpoint.rpartition(":")[0]
        own = f"is_host={int(host == options.local_addr)}"
        options.rdzv_conf = f"{options.rdzv_conf},{own}" if options.rdzv_conf else own
    return options


def _is_user_error(failures: dict[int, Any], restarts: int) -> bool:
    """Return whether a failure is a user error, which a restart cannot fix; otherwise print the reason of the restart."""
    if any(failure.exitcode == USER_ERROR_EXIT_CODE for failure in failures.values()):
        return True
    if restarts > 0:
        print(f"{_reason(*min(failures.items(), key=_order))}; restarting", file=sys.stderr, flush=True)
    return False


def first_failure(error: ChildFailedError) -> dict[str, Any]:
    """Return exit code and one-line reason of the process that failed first.

    A process that reports a reason comes before those that were only disconnected: when a process dies, the others fail
    a moment later in a collective, and the timestamps of error files have a resolution of one second.
    """
    rank, failure = min(error.failures.items(), key=_order)
    consequence = _order((rank, failure))[0] == _CONSEQUENCE
    return {"exit_code": failure.exitcode, "rank": rank, "reason": _reason(rank, failure), "consequence": consequence}


def _stopped(reason: str) -> dict[str, Any]:
    return {"exit_code": STOPPED_EXIT_CODE, "reason": reason, "consequence": True}


_CONSEQUENCE = 4  # a failure caused by another process's failure, or by a signal


def _order(item: tuple[int, Any]) -> tuple[int, float]:
    code, has_file = item[1].exitcode, Path(item[1].error_file).is_file()
    if code == USER_ERROR_EXIT_CODE:
        kind = 0
    elif is_consequence(item[1]) or (code == STOPPED_EXIT_CODE and not has_file):
        kind = _CONSEQUENCE
    elif code < 0 and code != -signal.SIGTERM:  # killed or crashed, which causes the others' errors
        kind = 1
    elif has_file:
        kind = 2
    else:
        kind = 3
    return kind, item[1].timestamp


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _reason(rank: int, failure: Any) -> str:
    has_file = Path(failure.error_file).is_file()
    if failure.exitcode == STOPPED_EXIT_CODE and not has_file:
        return "stopped from outside by a signal"
    if failure.exitcode < 0:
        memory = " (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""
        return f"process {rank} was killed by {failure.signal_name()}{memory}"
    if not has_file:
        return f"process {rank} ended with exit code {failure.exitcode} and no reason"
    message = failure.message
    text = _one_line(message.get("message", "") if isinstance(message, dict) else message)
    if failure.exitcode in (USER_ERROR_EXIT_CODE, STOPPED_EXIT_CODE):
        return re.sub(r"^\w+: ", "", text)  # torch elastic puts the class before the message
    return f"process {rank}: {text}"


if __name__ == "__main__":
    code = main(sys.argv[1:])
    gc.freeze()  # otherwise Python searches everything that torch has imported for cycles when it ends
    sys.exit(code)
