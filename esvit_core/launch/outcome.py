"""The outcome of a launched training, and how the step that launched it ends."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esvit_core.errors import (
    CRASH_EXIT_CODE,
    TRY_AGAIN_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
    EsvitError,
    LostPeerError,
    error_of,
)
from esvit_core.runs.events import failed_since, record_event
from esvit_core.runs.training_summary import LATEST
from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.retry import RetryPolicy

CONSEQUENCE_DELAY_SECONDS = 2.0
CONSEQUENCE = "consequence"


@dataclass
class Outcome:
    """How the training processes ended: stopped by a signal, failed, or (neither) finished.

    Attributes:
        signal: signal that the launcher received, 0 if none.
        reason: of the failure, in one line; empty if there is none.
        rank: rank of the process that failed first, if known.
        log_tail: last lines of its log, if only a traceback explains the failure.
        exit_code: of the step if it failed: 1, 2 or 75, see :mod:`esvit_core.errors`.
    """

    signal: int = 0
    reason: str = ""
    rank: int | None = None
    log_tail: str = ""
    exit_code: int = CRASH_EXIT_CODE


def step_exit_code(exit_code: int) -> int:
    """Return the exit code of a step whose training process ended with ``exit_code``: 1, 2 or 75.

    A process that was killed (a negative code, or 128 + signal) may succeed when it is restarted.
    """
    if exit_code < 0 or exit_code > 128:
        return TRY_AGAIN_EXIT_CODE
    return exit_code if exit_code in (USER_ERROR_EXIT_CODE, TRY_AGAIN_EXIT_CODE) else CRASH_EXIT_CODE


def conclude(store: ObjectStore, run_uri: str, outcome: Outcome) -> None:
    """End the step according to the outcome of its training.

    Raises:
        UserError, InfrastructureError, CrashError: the training failed; the text is the reason.
        SystemExit: it was interrupted (code 128 + signal).
    """
    if outcome.signal:
        step = _checkpointed_step(store, run_uri)
        print(f"train: interrupted; rerun the command to resume from step {step}", flush=True)
        raise SystemExit(128 + outcome.signal)
    if outcome.reason:
        _record_failure(_with_few_retries(store), run_uri, outcome)
        raise error_of(outcome.exit_code, outcome.reason)


def _record_failure(store: ObjectStore, run_uri: str, outcome: Outcome) -> None:
    """Record the failure in the event log, if the store answers."""
    facts = {"log_tail": outcome.log_tail} if outcome.log_tail else None
    with contextlib.suppress(EsvitError):
        record_event(store, run_uri, "failed", reason=outcome.reason, rank=outcome.rank, facts=facts)


def mark_consequence() -> None:
    """Mark this process's failure, in the error file that torch elastic reads, as the consequence of another's."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        path = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
        content = json.loads(path.read_text(encoding="utf-8"))
        content["message"]["extraInfo"][CONSEQUENCE] = True
        path.write_text(json.dumps(content), encoding="utf-8")


def report_blocked() -> None:
    """Report, for the agent and in the log, that this process ends because of another one while it is blocked."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    error = LostPeerError("another training process was lost, and this one is blocked behind it")
    get_error_handler().record_exception(error)
    mark_consequence()
    print(f"error: {error}", file=sys.stderr, flush=True)


def is_consequence(failure: Any) -> bool:
    """Return whether a failure (torch elastic's ``ProcessFailure``) was marked by :func:`mark_consequence`."""
    try:
        return bool(failure.error_file_data["message"]["extraInfo"][CONSEQUENCE])
    except (KeyError, TypeError):
        return False


def record_own_failure(run_uri: str, error: BaseException, rank: int, start: float) -> None:
    """Record this process's failure in the event log, if no launcher does so: under plain torchrun.

    Rank 0 records at once. The other processes wait a little and record only if no failure has been recorded; they wait
    longer if they only lost another process, which may have the reason.

    Args:
        run_uri: ``s3://bucket/runs/<id>``.
        error: error with which this process ends.
        rank: of this process.
        start: start time of this process, seconds since 1970; a failure recorded since then is the same failure.
    """
    lost = isinstance(error, LostPeerError)
    time.sleep(CONSEQUENCE_DELAY_SECONDS * (lost + (rank > 0)) + min(1.0, 0.05 * rank))
    text = " ".join(str(error).split()) or type(error).__name__
    known = isinstance(error, EsvitError)
    outcome = Outcome(reason=text if known else f"process {rank}: {type(error).__name__}: {text}", rank=rank)
    with contextlib.suppress(EsvitError):
        store = _with_few_retries(ObjectStore.from_env())
        if not failed_since(store, run_uri, start):
            _record_failure(store, run_uri, outcome)


def _with_few_retries(store: ObjectStore) -> ObjectStore:
    """Return the same store with few retries, because ending soon matters more than this record."""
    return ObjectStore(store.address, RetryPolicy(attempts=3))


def _checkpointed_step(store: ObjectStore, run_uri: str) -> int:
    pointer = store.read_pointer(join_uri(run_uri, LATEST))
    return int(pointer.value["step"]) if pointer else 0
