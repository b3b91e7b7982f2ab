"""Lease: one retraining per champion at a time.

Each champion has one lease: a pointer, changed by compare-and-swap, that names the newest retraining and its owner. An
owner that dies does not release it. Another owner may take it over once the run has written nothing for
``retrain.lease_hours``.
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
from esvit_core.registry.champions import timestamp
from esvit_core.runs.run import LEASES, PROMOTION
from esvit_core.storage import ObjectStore, Pointer, join_uri


@dataclass(frozen=True)
class Lease:
    """The newest retraining of a champion.

    Attributes:
        run: ``s3://bucket/runs/<id>``.
        request: digest of the configuration and the source, see :func:`request_digest`.
        owner: who runs it; the same owner may resume it.
        since: when the lease was acquired, ISO 8601.
        base: prefix of the prepared data that it extends; None: it reads every image.
    """

    run: str
    request: str
    owner: str
    since: str
    base: str | None

    @classmethod
    def of(cls, pointer: Pointer | None) -> Self | None:
        """Read the lease from its pointer; None if it was never acquired."""
        return None if pointer is None else cls(**pointer.value)

    def is_decided(self, store: ObjectStore) -> bool:
        """Whether the retraining is finished: its promotion was decided either way."""
        return store.exists(join_uri(self.run, PROMOTION))

    def acquire(self, store: ObjectStore, config: Config, expected: Pointer | None) -> bool:
        """Acquire the lease; False if another process was faster."""
        return store.swap_pointer(lease_uri(config), asdict(self), expected)

    def renewed_by(self, owner: str) -> Lease:
        """The lease on the same retraining, with a new owner or a new time."""
        return replace(self, owner=owner, since=timestamp())


def lease_uri(config: Config) -> str:
    """Address of the lease on the champion that ``config`` names."""
    return join_uri(f"s3://{config.bucket}", LEASES, config.promotion.pointer)


def request_digest(config: Config, source: str) -> str:
    """Digest of a retraining's configuration and source; only an equal request resumes an unfinished retraining."""
    excluded: Any = {**execution_fields(Config), "retrain": {"lease_hours"}}
    request = [config.model_dump(mode="json", exclude=excluded), source]
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def require_available(lease: Lease, owner: str, config: Config, store: ObjectStore) -> None:
    """Return if ``owner`` may take the lease on an unfinished retraining.

    Raises:
        UserError: another owner holds it, and its run has written something within ``retrain.lease_hours``.
    """
    if lease.owner == owner:
        return
    written = (found.modified for found in store.list(lease.run))
    last = max(
        [
            datetime.fromisoformat(lease.since).timestamp(),
            *(moment.timestamp() for moment in written if moment is not None),
        ]
    )
    silent = max(time.time() - last, 0.0)
    if silent >= 3600 * config.retrain.lease_hours:
        print(f"taking over from {lease.owner}, which has written nothing for {format_duration(silent)}", flush=True)
        return
    raise UserError(
        f"retrain: {lease.owner} has held the lease on {lease.run} since {lease.since}, last write "
        f"{format_duration(silent)} ago; wait until it finishes, or, if it has died, take over with retrain.lease_hours=0"
    )
