"""Report: called directly, and run by kfp.local, on a real object store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esvit_components.reporting.report import report
from esvit_core.runs.run import Run


def test_the_artifact_is_the_report_itself(run_there: Run, components: Any) -> None:
    run_there.store.remove(run_there.at("report/report.html"))
    results = [run_there.at("evaluation/knn.json")]
    _, artifacts = components.directly(report, run_uri=run_there.uri, results=results)
    html = artifacts["html"]
    text = Path(html.path).read_text(encoding="utf-8")
    assert text.lstrip().lower().startswith("<!doctype html>")
    assert text.encode() == run_there.store.get_bytes(run_there.at("report/report.html"))
    assert html.metadata["uri"] == run_there.at("report/report.html")


def test_again_it_finds_the_report(run_there: Run, components: Any) -> None:
    outputs = components.through_kfp(report, run_uri=run_there.uri, results=["a", "b"])
    assert Path(outputs["html"]["uri"]).read_bytes() == run_there.store.get_bytes(run_there.at("report/report.html"))
    assert outputs["html"]["metadata"]["results"] == 2
