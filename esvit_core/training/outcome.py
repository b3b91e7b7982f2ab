"""How a launched training has ended, and what the step that launched it makes of that."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

from esvit_core.errors import UserError
from esvit_core.monitoring.journal import failed_since, note
from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.retry import RetryPolicy
from esvit_core.training.summary import LATEST

ECHO_SECONDS = 2.0


@dataclass
class Outcome:
    """How the processes ended: on a signal to the launcher, for a reason, or (neither) of themselves."""

    signal: int = 0
    reason: str = ""
    rank: int | None = None
    last_words: str = ""


def conclude(store: ObjectStore, run_uri: str, outcome: Outcome) -> None:
    """End the step as its training has ended.

    Raises:
        UserError: the training failed; the text is the reason.
        SystemExit: it was interrupted (code 128 + signal).
    """
    if outcome.signal:
        step = _checkpointed_step(store, run_uri)
        print(f"train: interrupted; the same command again goes on from step {step}", flush=True)
        raise SystemExit(128 + outcome.signal)
    if outcome.reason:
        _note_failure(_impatient(store), run_uri, outcome)
        raise UserError(outcome.reason)


def _note_failure(store: ObjectStore, run_uri: str, outcome: Outcome) -> None:
    """Leave the reason in the run's journal, unless the store is itself the reason."""
    facts = {"last_words": outcome.last_words} if outcome.last_words else None
    with contextlib.suppress(UserError):
        note(store, run_uri, "failed", reason=outcome.reason, rank=outcome.rank, facts=facts)


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
    from torch.distributed import DistError

    lost = isinstance(error, DistError) or "peer" in str(error)
    time.sleep(ECHO_SECONDS * (lost + (rank > 0)) + min(1.0, 0.05 * rank))
    text = " ".join(str(error).split()) or type(error).__name__
    known = isinstance(error, UserError)
    outcome = Outcome(reason=text if known else f"process {rank}: {type(error).__name__}: {text}", rank=rank)
    with contextlib.suppress(UserError):
        store = _impatient(ObjectStore.from_env())
        if not failed_since(store, run_uri, began):
            _note_failure(store, run_uri, outcome)


def _impatient(store: ObjectStore) -> ObjectStore:
    """The same store, given up soon: what it is told now matters less than an end."""
    return ObjectStore(store.address, RetryPolicy(attempts=3))


def _checkpointed_step(store: ObjectStore, run_uri: str) -> int:
    pointer = store.read_pointer(join_uri(run_uri, LATEST))
    return int(pointer.value["step"]) if pointer else 0
