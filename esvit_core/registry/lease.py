"""Who is at a retraining: of two at once one goes on, and the other is told who has it.

There is a claim for each champion: a pointer, changed by compare-and-swap, that names the newest retraining and its
owner. An owner that has died need not say so: whoever finds no sign of its life for long enough takes over, and the
sign is whatever the run has written last.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Self

from esvit_core.config import Config
from esvit_core.config.section import execution_fields
from esvit_core.errors import UserError
from esvit_core.monitoring.progress_line import format_duration
from esvit_core.registry.champions import now
from esvit_core.runs.run import CLAIMS, PROMOTION
from esvit_core.storage import ObjectStore, Pointer, join_uri


@dataclass(frozen=True)
class Claim:
    """The newest retraining of a champion.

    Attributes:
        run: ``s3://bucket/runs/<id>``.
        request: see :func:`request_of`.
        owner: who makes it; the same one may begin again.
        since: when it was claimed, ISO 8601.
        base: folder of the data that it builds on; None: it reads everything.
    """

    run: str
    request: str
    owner: str
    since: str
    base: str | None

    @classmethod
    def of(cls, pointer: Pointer | None) -> Self | None:
        """What the pointer says; None where it was never set."""
        return None if pointer is None else cls(**pointer.value)

    def is_decided(self, store: ObjectStore) -> bool:
        """Whether the retraining is finished: its backbone was promoted, or not."""
        return store.exists(join_uri(self.run, PROMOTION))

    def put(self, store: ObjectStore, config: Config, expected: Pointer | None) -> bool:
        """Make it the claim that counts; False if another was quicker."""
        return store.swap_pointer(claim_uri(config), asdict(self), expected)

    def taken_by(self, owner: str) -> Claim:
        """The same retraining, by another or once more."""
        return replace(self, owner=owner, since=now())


def claim_uri(config: Config) -> str:
    """Where the claim of a configuration's champion lies."""
    return join_uri(f"s3://{config.bucket}", CLAIMS, config.promotion.pointer)


def request_of(config: Config, source: str) -> str:
    """Digest of what is asked for: an unfinished retraining goes on only for the same."""
    left: Any = {**execution_fields(Config), "retrain": {"claim_hours"}}
    asked = [config.model_dump(mode="json", exclude=left), source]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def require_free(claim: Claim, owner: str, config: Config, store: ObjectStore) -> None:
    """Return if ``owner`` may have a retraining that is not finished.

    Raises:
        UserError: another is at it, and alive as far as one can tell.
    """
    if claim.owner == owner:
        return
    written = (found.modified for found in store.list(claim.run))
    last = max(
        [
            datetime.fromisoformat(claim.since).timestamp(),
            *(moment.timestamp() for moment in written if moment is not None),
        ]
    )
    silent = max(time.time() - last, 0.0)
    if silent >= 3600 * config.retrain.claim_hours:
        print(f"taking over from {claim.owner}, silent for {format_duration(silent)}", flush=True)
        return
    raise UserError(
        f"retrain: {claim.owner} is at {claim.run} since {claim.since}, last sign of life {format_duration(silent)} "
        "ago; wait for it, or, if it is dead, take over with retrain.claim_hours=0"
    )
