"""Print the differences between a golden folder and our outputs: runs ``tests/golden`` and prints its measurements.

    python benchmarks/golden_table.py [--golden-dir DIR]

The tables are Markdown, one row for each network and file. A difference is the largest absolute one of an array;
relative differences are labelled. The exit code is pytest's: 0 if every array is within its tolerance.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent / "tests" / "golden"


class Collector:
    """Collects the differences that the tests record."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, dict[str, float]]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.rows += [value for name, value in report.user_properties if name == "golden"]


def tables(rows: list[tuple[str, dict[str, float]]]) -> str:
    """Format the rows as Markdown; rows with the same columns share one table."""
    lines: list[str] = []
    head: list[str] = []
    for row, differences in rows:
        if list(differences) != head:
            head = list(differences)
            lines += ["", f"| | {' | '.join(head)} |", "| --- " * (len(head) + 1) + "|"]
        lines.append(f"| {row} | {' | '.join(f'{value:.1e}' for value in differences.values())} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden-dir", type=Path, default=TESTS, help="folder with golden.json and its files")
    folder = parser.parse_args().golden_dir.resolve()
    if not (folder / "golden.json").is_file():
        parser.error(f"--golden-dir {folder}: expected a folder with golden.json in it")
    collector = Collector()
    code = pytest.main([str(TESTS), "--golden-dir", str(folder), "-q", "--timeout=0"], plugins=[collector])
    # Narrow tables last: networks with all arrays first.
    print(tables(sorted(collector.rows, key=lambda row: (-len(row[1]), list(row[1]), row[0]))))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
