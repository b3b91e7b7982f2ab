"""Which tests `make test-fast` leaves out: those that took longest when all of them were last measured.

`slow-tests.txt` lists them, by file where all tests of a file are slow, otherwise by function. `make slow-tests` measures
again and rewrites it. A new test is not in the list and runs. The tests that need the finished run are slow without being
listed, because the first that runs has to make it.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

LIST = Path(__file__).with_name("slow-tests.txt")
LIMIT = 0.25  # seconds of a test function, all parameters, with its fixtures


def listed() -> frozenset[str]:
    """The files and the tests of the list, such as ``tests/golden/test_networks.py`` and ``tests/a.py::test_b``."""
    return frozenset(LIST.read_text(encoding="utf-8").split())


def function_of(nodeid: str) -> str:
    """The id of a test's function: its id without parameters."""
    return nodeid.partition("[")[0]


class Recorder:
    """Measures all tests and writes the list.

    A fixture that several tests share is paid by the first that runs; without it, by the next. So a run without the
    slow tests adds those that became slow.

    Args:
        added_to: the list so far, for a run without the slow tests.
    """

    def __init__(self, added_to: frozenset[str] = frozenset()) -> None:
        self._slow = set(added_to)
        self._seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[function_of(report.nodeid)] += report.duration

    def pytest_sessionfinish(self) -> None:
        self._slow |= {test for test, seconds in self._seconds.items() if seconds > LIMIT}
        files = {test.partition("::")[0] for test in self._seconds}
        whole = {f for f in files if all(t in self._slow for t in self._seconds if t.startswith(f + "::"))}
        kept = {test for test in self._slow if test.partition("::")[0] not in whole} | whole
        LIST.write_text("".join(f"{test}\n" for test in sorted(kept)), encoding="utf-8")
