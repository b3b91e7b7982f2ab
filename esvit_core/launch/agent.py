"""The process between the launcher and the training processes: torch elastic's agent, with a few things added.

It ends when the launcher dies, however that dies; it leaves the reason of the first failure, in one line, where
torchx or Kubernetes looks for it; and it does not repeat what failed by a mistake of the user's.
``python -m esvit_core.launch.agent`` takes torchrun's arguments.

Exit codes: 0; 2 a mistake in the input; 75 an infrastructure failure, stopped from outside, or parted from the other
nodes: started again it continues; 1 the training processes crashed more often than ``--max-restarts``.
"""

from __future__ import annotations

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
from esvit_core.launch.stop import RENDEZVOUS_VARIABLE, STOPPED_EXIT_CODE, end_with
from esvit_core.runs.environment import available_cores

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

AGENT_MODULE = "esvit_core.launch.agent"
LAUNCHER_VARIABLE = "ESVIT_LAUNCHER_PID"
AGENT_VARIABLE = "ESVIT_AGENT_PID"
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"


def main(arguments: list[str]) -> int:
    """Run torchrun; the exit code is that of the first process that failed, 0 when none has."""
    if launcher := os.environ.get(LAUNCHER_VARIABLE):
        end_with(int(launcher))
    if os.getpid() == 1:  # of a container: until torch listens, the kernel would not let a signal reach it
        signal.signal(signal.SIGTERM, lambda *_: os._exit(STOPPED_EXIT_CODE))
    os.environ[AGENT_VARIABLE] = str(os.getpid())

    os.environ.setdefault("OMP_NUM_THREADS", str(_threads(arguments)))  # torchrun would set 1
    # With the store shared, a node that comes back waits for an address that nobody writes (torch 2.14).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    import torch.distributed.run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    from esvit_core.torch_private import watch_failures

    # The exchange of failures between agents is torch's; between this one and the launcher it is the file below.
    error_file = os.environ.pop(ERROR_FILE_VARIABLE, None)
    if not watch_failures(_is_mistake):
        print("train: this torch tries again whatever failed, a mistake in the settings too", flush=True)
    try:
        torch.distributed.run.run(_with_host(torch.distributed.run.parse_args(arguments)))
        return 0
    except ChildFailedError as error:
        failure = first_failure(error)
    except SignalException as error:
        failure = _stopped(f"stopped from outside by {error.sigval.name}")
    except RendezvousError as error:
        failure = _stopped(f"parted from the other nodes: {_one_line(error)}")
    if launcher and os.getppid() != int(launcher):
        shutil.rmtree(os.environ[RENDEZVOUS_VARIABLE], ignore_errors=True)  # nobody else is left to do it
    elif error_file:
        Path(error_file).write_text(json.dumps(failure), encoding="utf-8")
    print(failure["reason"], file=sys.stderr, flush=True)
    return failure["exit_code"] if failure["exit_code"] > 0 else 1


def _threads(arguments: list[str]) -> int:
    """Of each process: together they use every core of the pod once."""
    processes = arguments[arguments.index("--nproc_per_node") + 1] if "--nproc_per_node" in arguments else "1"
    return max(1, available_cores() // int(processes))


def _with_host(options: Any) -> Any:
    """Of several nodes the one whose address is the endpoint's keeps the rendezvous' store.

    torch would find out by resolving names, which a pod's may not be when it starts.
    """
    if options.local_addr and options.rdzv_backend == "c10d" and "store_type" not in options.rdzv_conf:
        host = options.rdzv_endpoint.rpartition(":")[0]
        own = f"is_host={int(host == options.local_addr)}"
        options.rdzv_conf = f"{options.rdzv_conf},{own}" if options.rdzv_conf else own
    return options


def _is_mistake(failures: dict[int, Any], restarts: int) -> bool:
    """Whether one of the failures is the user's mistake, which trying again does not mend; else say what it was."""
    if any(failure.exitcode == USER_ERROR_EXIT_CODE for failure in failures.values()):
        return True
    if restarts > 0:
        print(f"{_reason(*min(failures.items(), key=_order))}; starting again", file=sys.stderr, flush=True)
    return False


def first_failure(error: ChildFailedError) -> dict[str, Any]:
    """Exit code and one-line reason of the process that failed first.

    A process that explains itself comes before those that were merely cut off: when one of them dies, the others
    fail a moment later, in the middle of a collective, and the clock of the error files has whole seconds.
    """
    rank, failure = min(error.failures.items(), key=_order)
    stopped = _order((rank, failure))[0] == _CONSEQUENCE
    return {"exit_code": failure.exitcode, "rank": rank, "reason": _reason(rank, failure), "consequence": stopped}


def _stopped(reason: str) -> dict[str, Any]:
    return {"exit_code": STOPPED_EXIT_CODE, "reason": reason, "consequence": True}


_CONSEQUENCE = 4  # of another process's failure, or of a signal


def _order(item: tuple[int, Any]) -> tuple[int, float]:
    code, has_file = item[1].exitcode, Path(item[1].error_file).is_file()
    if code == USER_ERROR_EXIT_CODE:
        kind = 0
    elif is_consequence(item[1]) or (code == STOPPED_EXIT_CODE and not has_file):
        kind = _CONSEQUENCE
    elif code < 0 and code != -signal.SIGTERM:  # killed from outside, or crashed: the others' errors follow from it
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
        return f"process {rank} ended with exit code {failure.exitcode} and without a reason"
    message = failure.message
    text = _one_line(message.get("message", "") if isinstance(message, dict) else message)
    if failure.exitcode in (USER_ERROR_EXIT_CODE, STOPPED_EXIT_CODE):
        return re.sub(r"^\w+: ", "", text)  # torch elastic puts the class before the text: UserError, StoreFull, ...
    return f"process {rank}: {text}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
