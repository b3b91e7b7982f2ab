"""What the tests saw, as an HTML page: a row for each check with its lines, commands and screenshots."""

from __future__ import annotations

import datetime
import json
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jinja2


@dataclass
class Entry:
    """One check.

    Attributes:
        name: of the test.
        title: what it checks, the first line of its docstring.
        state: ``passed``, ``failed``, ``not run``.
        lines: what it saw.
        images: file name and caption of each screenshot.
        reason: of a failure, or why it was not run.
        seconds: that it took.
    """

    name: str
    title: str
    state: str = "running"
    lines: list[str] = field(default_factory=list)
    images: list[tuple[str, str]] = field(default_factory=list)
    reason: str = ""
    seconds: float = 0.0


class Evidence:
    """Collects the entries and writes ``index.html`` and ``evidence.json`` after each of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self.facts: dict[str, str] = {}
        self.began = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def fact(self, name: str, value: str) -> None:
        """A version or a size of the cluster, for the head of the page."""
        self.facts[name] = value

    def write(self) -> None:
        """Write the page as it stands."""
        values: dict[str, Any] = {
            "entries": list(self.entries.values()),
            "facts": self.facts,
            "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
            "minutes": (time.monotonic() - self.began) / 60,
        }
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
        )
        page = environment.get_template("evidence.html.jinja").render(values)
        (self.folder / "index.html").write_text(page, encoding="utf-8")
        plain = {**values, "entries": [asdict(entry) for entry in self.entries.values()]}
        (self.folder / "evidence.json").write_text(json.dumps(plain, indent=1), encoding="utf-8")


class Saw:
    """What one test reports while it runs."""

    def __init__(self, evidence: Evidence, entry: Entry, show: Any) -> None:
        self._evidence, self._entry, self._show = evidence, entry, show

    def __call__(self, line: str) -> None:
        """A line of the report, shown on the terminal too."""
        self._entry.lines.append(line)
        self._show(f"    {line}")

    def command(self, done: subprocess.CompletedProcess[str], last: int = 12) -> None:
        """A command and the last lines that it printed."""
        printed = (done.stdout + done.stderr).strip().splitlines()[-last:]
        self._entry.lines.append(f"$ {' '.join(map(str, done.args))}  [exit code {done.returncode}]")
        self._entry.lines += printed
        self._show("\n".join(f"    {line}" for line in [self._entry.lines[-len(printed) - 1], *printed]))

    def image_path(self, caption: str) -> Path:
        """Where a screenshot goes; it is on the page from then on."""
        name = f"{self._entry.name}-{len(self._entry.images) + 1}.png"
        self._entry.images.append((name, caption))
        return self._evidence.folder / name
