"""Relay the log of rank 0, line by line, into the log of the step that waits for it."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import Any

from esvit_core.errors import UserError
from esvit_core.launch.kubernetes.client import Cluster, ForbiddenError, UnreachableError, iter_lines

REATTACH_SECONDS = 60.0  # how far to go back in the log of a job that existed before


class LogRelay:
    """Prints the log of a pod; if the pod is replaced or the stream breaks, it continues with the next.

    Args:
        cluster: cluster of the pods.
        back: how far to go back in the first pod's log, seconds.
    """

    def __init__(self, cluster: Cluster, back: float) -> None:
        self._cluster, self._back = cluster, back
        self._thread: threading.Thread | None = None
        self._response: Any = None
        self._read: set[str] = set()  # uids of pods whose log has been read to its end
        self._last = ""
        self._last_read = 0.0

    def follow(self, pod: dict[str, Any] | None) -> None:
        """Start to read the log of the pod, unless it is being read.

        Args:
            pod: the pod object; None if there is none.
        """
        if pod is None or (self._thread and self._thread.is_alive()):
            return
        uid, phase = pod["metadata"]["uid"], pod.get("status", {}).get("phase")
        if uid in self._read or phase not in ("Running", "Succeeded", "Failed"):
            return
        arguments = (pod["metadata"]["name"], uid, phase != "Running")
        self._thread = threading.Thread(target=self._relay, args=arguments, daemon=True)
        self._thread.start()

    def drain(self, seconds: float) -> None:
        """Wait at most ``seconds`` for the end of the log that is being read, then stop reading."""
        if self._thread:
            self._thread.join(seconds)
        if self._response is not None:
            with contextlib.suppress(Exception):  # closing a stream that another thread reads may raise anything
                self._response.close()

    def _relay(self, name: str, uid: str, ended: bool) -> None:
        back = time.monotonic() - self._last_read + 5 if self._last_read else self._back
        try:
            self._response = self._cluster.log(name, back)
        except ForbiddenError as error:
            self._read.add(uid)  # prints the error only once
            print(f"train: {error}", flush=True)
            return
        except (UserError, UnreachableError):
            return  # a container that has not started has no log yet
        for line in iter_lines(self._response):
            self._last_read = time.monotonic()
            when, _, text = line.partition(" ")
            if (instant := _instant(when)) > self._last:  # since_seconds has whole seconds, so lines may repeat
                self._last = instant
                sys.stdout.write(f"{text}\n")
                sys.stdout.flush()
        if ended:
            self._read.add(uid)


def _instant(time_stamp: str) -> str:
    """Return a sortable time with nine decimal digits."""
    seconds, _, fraction = time_stamp.rstrip("Z").partition(".")
    return f"{seconds}.{fraction:0<9}"
