"""The progress lines."""

import io
import subprocess
import sys

import pytest

from esvit_core.monitoring.progress_line import ProgressLine, format_duration, format_figure


def test_a_line_has_share_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    out = io.StringIO()
    progress = ProgressLine(1600, unit="images", label="prepare", stream=out)
    now[0] += 8
    progress.update(1024, loss=5.1234)
    assert out.getvalue() == "prepare  1,024/1,600 images  64 %  128/s  0:04 left  loss 5.12\n"


def test_a_fast_first_unit_and_the_start_before_it_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    out = io.StringIO()
    progress = ProgressLine(20_000, unit="images", label="prepare", stream=out)
    for seconds, images in ((0.6, 1), (2.0, 2000)):
        now[0] += seconds
        progress.update(images)
    assert out.getvalue().splitlines() == [
        "prepare  1/20,000 images  0 %",
        "prepare  2,001/20,000 images  10 %  1,000/s  0:18 left",
    ]


def test_lines_are_printed_once_per_interval_and_the_first_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    out = io.StringIO()
    progress = ProgressLine(100, unit="steps", label="train", stream=out)
    for _ in range(50):
        progress.update(1)
        now[0] += 0.1
    lines = out.getvalue().splitlines()
    assert lines[0] == "train  1/100 steps  1 %"
    assert len(lines) == 3


def test_the_last_line_has_the_duration_and_is_printed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    out = io.StringIO()
    with ProgressLine(None, unit="images", label="read", initial=10, stream=out) as progress:
        now[0] += 65
        progress.update(130)
    progress.close()
    assert out.getvalue().splitlines()[-1] == "read  140 images  2.00/s  took 1:05"
    assert out.getvalue().count("took") == 1


def test_an_error_is_the_last_line() -> None:
    out = io.StringIO()
    with pytest.raises(ValueError), ProgressLine(10, stream=out):
        raise ValueError
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (65, "1:05"), (4025, "1:07:05"), (176_820, "2 d 01:07"), (-1, "0:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1234567, "1,234,567"), (512.4, "512"), (5.1234, "5.12"), (0.00042, "0.00042"), ("a/b", "a/b")]
)
def test_figures(value: float | str, text: str) -> None:
    assert format_figure(value) == text


def test_progress_does_not_import_torch() -> None:
    code = "import sys, esvit_core.monitoring.progress_line; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
