"""How a launched training has ended, and what the step that launched it makes of that."""

from __future__ import annotations

import contextlib
import json
import os
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
from esvit_core.runs.events import failed_since, note
from esvit_core.runs.training_summary import LATEST
from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.retry import RetryPolicy

ECHO_SECONDS = 2.0
CONSEQUENCE = "consequence"


@dataclass
class Outcome:
    """How the processes ended: on a signal to the launcher, for a reason, or (neither) of themselves.

    Attributes:
        signal: that the launcher received, 0 if none.
        reason: of the failure, in one line; empty if there is none.
        rank: of the process that failed first, if it is known.
        last_words: end of its log, where only a traceback explains the failure.
        exit_code: of the step when there is a reason: 1, 2 or 75, see :mod:`esvit_core.errors`.
    """

    signal: int = 0
    reason: str = ""
    rank: int | None = None
    last_words: str = ""
    exit_code: int = CRASH_EXIT_CODE


def family_of(exit_code: int) -> int:
    """The exit code of a step whose training process ended with ``exit_code``: 1, 2 or 75.

    A process that was killed (a negative code, or 128 + signal) may succeed when it is started again.
    """
    if exit_code < 0 or exit_code > 128:
        return TRY_AGAIN_EXIT_CODE
    return exit_code if exit_code in (USER_ERROR_EXIT_CODE, TRY_AGAIN_EXIT_CODE) else CRASH_EXIT_CODE


def conclude(store: ObjectStore, run_uri: str, outcome: Outcome) -> None:
    """End the step as its training has ended.

    Raises:
        UserError, InfrastructureError, CrashError: the training failed; the text is the reason.
        SystemExit: it was interrupted (code 128 + signal).
    """
    if outcome.signal:
        step = _checkpointed_step(store, run_uri)
        print(f"train: interrupted; the same command again goes on from step {step}", flush=True)
        raise SystemExit(128 + outcome.signal)
    if outcome.reason:
        _note_failure(_impatient(store), run_uri, outcome)
        raise error_of(outcome.exit_code, outcome.reason)


def _note_failure(store: ObjectStore, run_uri: str, outcome: Outcome) -> None:
    """Leave the reason in the run's journal, unless the store is itself the reason."""
    facts = {"last_words": outcome.last_words} if outcome.last_words else None
    with contextlib.suppress(EsvitError):
        note(store, run_uri, "failed", reason=outcome.reason, rank=outcome.rank, facts=facts)


def mark_consequence() -> None:
    """Say in the error file of this process, which torch elastic reads, that another process has the reason."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        path = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
        said = json.loads(path.read_text(encoding="utf-8"))
        said["message"]["extraInfo"][CONSEQUENCE] = True
        path.write_text(json.dumps(said), encoding="utf-8")


def is_consequence(failure: Any) -> bool:
    """Whether a failed process, torch elastic's ``ProcessFailure``, has marked its failure as one."""
    try:
        return bool(failure.error_file_data["message"]["extraInfo"][CONSEQUENCE])
    except (KeyError, TypeError):
        return False


def note_own_failure(run_uri: str, error: BaseException, rank: int, began: float) -> None:
    """Leave the reason in the journal, in a process that nobody launched who would do it: under plain torchrun.

    The first process does so at once. The others wait a little and leave it at that if a reason is there; longer when
    they have merely lost another, which may have one.

    Args:
        run_uri: ``s3://bucket/runs/<id>``.
        error: what this process ends with.
        rank: of this process.
        began: when it did, seconds since 1970; a failure noted since then is the same one.
    """
    lost = isinstance(error, LostPeerError)
    time.sleep(ECHO_SECONDS * (lost + (rank > 0)) + min(1.0, 0.05 * rank))
    text = " ".join(str(error).split()) or type(error).__name__
    known = isinstance(error, EsvitError)
    outcome = Outcome(reason=text if known else f"process {rank}: {type(error).__name__}: {text}", rank=rank)
    with contextlib.suppress(EsvitError):
        store = _impatient(ObjectStore.from_env())
        if not failed_since(store, run_uri, began):
            _note_failure(store, run_uri, outcome)


def _impatient(store: ObjectStore) -> ObjectStore:
    """The same store, given up soon: what it is told now matters less than an end."""
    return ObjectStore(store.address, RetryPolicy(attempts=3))


def _checkpointed_step(store: ObjectStore, run_uri: str) -> int:
    pointer = store.read_pointer(join_uri(run_uri, LATEST))
    return int(pointer.value["step"]) if pointer else 0
