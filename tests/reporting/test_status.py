"""What the store alone tells of a run, at every stage of it."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from rich.console import Console

from esvit_core.config import Config
from esvit_core.reporting.terminal import runs_table, status_view
from esvit_core.runs import status
from esvit_core.runs.events import record_event
from esvit_core.runs.log import LogWriter
from esvit_core.runs.status import RunStatus, read_status, run_names
from esvit_core.storage.upload_queue import UploadQueue


class Story:
    """A run in the store, told step by step."""

    def __init__(self, store: Any, name: str = "demo-1") -> None:
        self.store, self.uri = store, store.uri(f"runs/{name}")
        store.put_bytes(f"{self.uri}/config.yaml", Config().to_yaml().encode())

    def start(self, step: int = 0) -> None:
        record_event(self.store, self.uri, "started", step=step, facts={"steps": 100, "processes": 2, "device": "cpu"})

    def train(self, steps: range, seconds: float = 0.5) -> None:
        uploads = UploadQueue(self.store, self.uri)
        writer, now = LogWriter(uploads), time.time()
        for step in steps:
            when = now - seconds * (steps[-1] - step)
            writer.write({"step": step, "epoch": 1, "loss": 9.0 / step, "images_per_second": 64.0, "time": when})
        writer.flush()
        uploads.close()

    def save(self, step: int) -> None:
        uri = f"{self.uri}/training/latest"
        assert self.store.swap_pointer(uri, {"step": step}, self.store.read_pointer(uri))

    def look(self, **how: Any) -> RunStatus:
        return read_status(self.store, self.uri, **how)


@pytest.fixture
def story(store: Any) -> Story:
    return Story(store)


def shown(run: RunStatus) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(status_view(run))
    return console.export_text()


def test_a_run_under_way(story: Story) -> None:
    assert story.look().state == "preparing"
    assert "none yet" in shown(story.look())
    story.start()
    story.train(range(1, 41))
    story.save(35)
    run = story.look()
    assert (run.state, run.step, run.steps, run.restarts) == ("training", 40, 100, 0)
    assert run.checkpoint is not None and run.checkpoint.step == 35 and abs(run.checkpoint.time - time.time()) < 60
    assert run.seconds_left == pytest.approx(30, rel=0.1)
    assert len(run.lines) == 40 and len(story.look(brief=True).lines) == 1
    text = shown(run)
    assert "40 of 100 steps, 40 %" in text and "0:30 left" in text and "step 35, 0:0" in text
    row = re.search(r"^ *loss ((?: +[0-9.]+){6})$", re.sub(" +\n", "\n", text), re.MULTILINE)
    assert row is not None and row[1].split() == ["9.00", "1.00", "0.529", "0.375", "0.281", "0.225"]


def test_a_run_that_was_stopped_and_goes_on(story: Story) -> None:
    story.start()
    record_event(story.store, story.uri, "stopped", step=12, reason="asked to stop")
    assert story.look().state == "stopped"
    assert story.look(alive=True).state == "preparing"  # the same command again, and no process trains yet
    story.start(12)
    assert (story.look().state, story.look().restarts, story.look().step) == ("training", 1, 12)


def test_a_run_that_failed_says_why(story: Story) -> None:
    story.start()
    record_event(story.store, story.uri, "failed", reason="training: process 1 was killed by SIGKILL [9]", rank=1)
    run = story.look()
    assert run.state == "failed" and run.failure is not None and run.failure.rank == 1
    text = shown(run)
    assert "pretrain failed: training: process 1 was killed by SIGKILL [9]" in text


def test_a_run_that_ended_without_a_word(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    story.start()
    story.train(range(1, 5))
    assert story.look(alive=False).state == "silent"  # its command is known to be gone
    assert story.look().state == "training"
    now = time.time()
    monkeypatch.setattr(status.time, "time", lambda: now + 600)
    assert story.look().state == "silent"
    assert "no activity for 10:0" in shown(story.look())


def test_a_step_after_the_training(story: Story) -> None:
    story.start()
    facts = dict.fromkeys(("steps", "epochs", "images", "seconds", "images_per_second", "final_loss"), 100)
    more = {"precision": "float32", "processes": 2, "threads": 1, "resumes": [], "backbone": ""}
    story.store.put_json(f"{story.uri}/training/summary.json", facts | more)
    assert (story.look().state, story.look().step) == ("measuring", 100)
    record_event(story.store, story.uri, "failed", component="knn", reason="no labels")
    assert story.look().state == "failed"
    story.store.put_bytes(f"{story.uri}/report/report.html", b"<p>")
    assert story.look().state == "finished"


def test_the_newest_run_comes_first(store: Any) -> None:
    assert run_names(store, store.bucket) == []
    Story(store, "old")
    time.sleep(1.1)  # times of objects have whole seconds
    Story(store, "new").start()
    names = run_names(store, store.bucket)
    assert names == ["new", "old"]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(runs_table([read_status(store, store.uri(f"runs/{name}"), brief=True) for name in names]))
    rows = [
        line.split()[:3]
        for line in console.export_text().splitlines()
        if line.startswith((" new", " old", "new", "old"))
    ]
    assert rows == [["new", "training", "0/100"], ["old", "preparing", "-"]]
