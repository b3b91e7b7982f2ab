"""Retry transient failures with exponential back-off."""

from __future__ import annotations

import http.client
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self, TypeVar

import urllib3.exceptions
from minio.error import InvalidResponseError, S3Error, ServerError

T = TypeVar("T")

# Not the shared generator: a repeated request must not change the random numbers of a seeded program.
_CHANCE = random.SystemRandom()

# S3's error codes for transient failures. All other 4xx errors are permanent.
_TRANSIENT_CODES = frozenset(
    {
        "InternalError",
        "OperationAborted",
        "ConditionalRequestConflict",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
    }
)
# 501: not implemented; 505: version not supported; 507: no space. Retrying does not help.
_LASTING_STATUSES = frozenset({501, 505, 507})
_THROTTLING_CODES = frozenset({"SlowDown", "Throttling", "ThrottlingException", "TooManyRequests"})
FAILURE_KINDS = ("connection", "timeout", "server", "throttled")

_failures: Counter[str] = Counter()
_failures_lock = threading.Lock()


class ShortBodyError(ConnectionError):
    """The connection ended before the body did."""


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential back-off with jitter.

    Args:
        attempts: total number of attempts, including the first.
        base: upper bound of the first wait, seconds; doubles every time.
        cap: longest wait, seconds.
    """

    attempts: int = 9
    base: float = 0.1
    cap: float = 6.0

    @classmethod
    def lasting(cls, seconds: float) -> Self:
        """Return a policy that gives a server at least ``seconds`` to come back."""
        return cls(attempts=cls.attempts + math.ceil(2 * seconds / cls.cap))

    def waits(self) -> Iterator[float]:
        """Yield the seconds to wait before each further attempt.

        Half of each wait is fixed, to give a restarting server time; half is random, so that many clients do not return at the
        same moment.
        """
        for attempt in range(self.attempts - 1):
            bound = min(self.cap, self.base * 2**attempt)
            yield bound * (0.5 + 0.5 * _CHANCE.random())


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed later: connection errors, 5xx, throttling."""
    if isinstance(error, S3Error):
        status = getattr(error.response, "status", 0) or 0
        return error.code in _TRANSIENT_CODES or (status >= 500 and status not in _LASTING_STATUSES)
    if isinstance(error, InvalidResponseError):
        return int(error._code) >= 500 and int(error._code) not in _LASTING_STATUSES
    if isinstance(error, ServerError):
        return error.status_code >= 500 and error.status_code not in _LASTING_STATUSES
    if isinstance(error, urllib3.exceptions.SSLError):
        return False  # retrying does not make a certificate valid
    return isinstance(error, (urllib3.exceptions.HTTPError, http.client.HTTPException, ConnectionError, TimeoutError))


def failed_requests() -> dict[str, int]:
    """Return the number of attempts of this process that failed transiently, by :data:`FAILURE_KINDS`."""
    with _failures_lock:
        return {kind: _failures[kind] for kind in FAILURE_KINDS}


def _kind(error: BaseException) -> str:
    if isinstance(error, S3Error):
        return "throttled" if error.code in _THROTTLING_CODES else "server"
    if isinstance(error, (InvalidResponseError, ServerError)):
        return "server"
    if isinstance(error, urllib3.exceptions.NewConnectionError):  # refused; a subclass of the timeout in urllib3 1.26
        return "connection"
    return "timeout" if isinstance(error, (urllib3.exceptions.TimeoutError, TimeoutError)) else "connection"


def _counted(operation: Callable[[], T]) -> T:
    try:
        return operation()
    except Exception as error:
        if is_transient(error):
            with _failures_lock:
                _failures[_kind(error)] += 1
        raise


def with_retries(operation: Callable[[], T], policy: RetryPolicy) -> T:
    """Call ``operation`` until it succeeds, fails permanently, or the attempts are used up.

    Args:
        operation: must be safe to repeat.
        policy: number of attempts, and waits between them.
    """
    for wait in policy.waits():
        try:
            return _counted(operation)
        except Exception as error:
            if not is_transient(error):
                raise
        time.sleep(wait)
    return _counted(operation)
