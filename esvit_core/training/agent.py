"""The process between the launcher and the training processes: torch elastic's agent, with two things added.

It ends when the launcher dies, however that dies; and it leaves the reason of the first failure, in one line, where
torchx looks for it. ``python -m esvit_core.training.agent`` takes torchrun's arguments.
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
from esvit_core.training.stop import RENDEZVOUS_VARIABLE, STOPPED_EXIT_CODE, end_with

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

LAUNCHER_VARIABLE = "ESVIT_LAUNCHER_PID"
AGENT_VARIABLE = "ESVIT_AGENT_PID"
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"


def main(arguments: list[str]) -> int:
    """Run torchrun; the exit code is that of the first process that failed, 0 when none has."""
    if launcher := os.environ.get(LAUNCHER_VARIABLE):
        end_with(int(launcher))
    os.environ[AGENT_VARIABLE] = str(os.getpid())

    # With the store shared, a node that comes back waits for an address that nobody writes (torch 2.14).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    import torch.distributed.run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The exchange of failures between agents is torch's; between this one and the launcher it is the file below.
    error_file = os.environ.pop(ERROR_FILE_VARIABLE, None)
    try:
        torch.distributed.run.run(torch.distributed.run.parse_args(arguments))
        return 0
    except ChildFailedError as error:
        failure = first_failure(error)
    except SignalException as error:
        failure = {"exit_code": STOPPED_EXIT_CODE, "reason": f"stopped from outside by {error.sigval.name}"}
    if launcher and os.getppid() != int(launcher):
        shutil.rmtree(os.environ[RENDEZVOUS_VARIABLE], ignore_errors=True)  # nobody else is left to do it
    elif error_file:
        Path(error_file).write_text(json.dumps(failure), encoding="utf-8")
    print(failure["reason"], file=sys.stderr, flush=True)
    return failure["exit_code"] if failure["exit_code"] > 0 else 1


def first_failure(error: ChildFailedError) -> dict[str, Any]:
    """Exit code and one-line reason of the process that failed first.

    A process that explains itself comes before those that were merely cut off: when one of them dies, the others
    fail a moment later, in the middle of a collective, and the clock of the error files has whole seconds.
    """

    def order(item: tuple[int, Any]) -> tuple[int, float]:
        code, has_file = item[1].exitcode, Path(item[1].error_file).is_file()
        if code == USER_ERROR_EXIT_CODE:
            kind = 0
        elif code < 0 and code != -signal.SIGTERM:  # killed from outside, or crashed: the others' errors follow from it
            kind = 1
        elif has_file:
            kind = 2
        else:
            kind = 3
        return kind, item[1].timestamp

    rank, failure = min(error.failures.items(), key=order)
    return {"exit_code": failure.exitcode, "rank": rank, "reason": _reason(rank, failure)}


def _reason(rank: int, failure: Any) -> str:
    if failure.exitcode == STOPPED_EXIT_CODE:
        return "stopped from outside by a signal"
    if failure.exitcode < 0:
        memory = " (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""
        return f"process {rank} was killed by {failure.signal_name()}{memory}"
    if not Path(failure.error_file).is_file():
        return f"process {rank} ended with exit code {failure.exitcode} and without a reason"
    message = failure.message
    text = " ".join(str(message.get("message", "") if isinstance(message, dict) else message).split())
    if failure.exitcode == USER_ERROR_EXIT_CODE:
        return re.sub(r"^\w+: ", "", text)  # torch elastic puts the class before the text: UserError, StoreFull, ...
    return f"process {rank}: {text}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
