"""Report, called directly and run by kfp.local, on a real object store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esvit_components.reporting.report import report
from esvit_core.reporting.figures import figures_of_run
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


def test_every_figure_of_the_run_is_in_its_metrics(run_there: Run, components: Any) -> None:
    _, artifacts = components.directly(report, run_uri=run_there.uri, results=[])
    figures = artifacts["metrics"].metadata
    measured = run_there.store.get_json(run_there.at("evaluation/knn.json"))["results"]
    assert figures["knn/5"] == measured["trained"]["knn/5"]
    assert figures["knn/5 (baseline)"] == measured["baseline"]["knn/5"]
    assert {"linear", "correspondence", "final_loss", "images_per_second"} <= figures.keys()


def test_what_was_not_measured_has_no_figures(run_there: Run) -> None:
    empty = f"{run_there.uri.rsplit('/', 1)[0]}/nothing-there"
    assert figures_of_run(empty, run_there.store) == {}


def test_again_it_finds_the_report(run_there: Run, components: Any) -> None:
    outputs = components.through_kfp(report, run_uri=run_there.uri, results=["a", "b"])
    assert Path(outputs["html"]["uri"]).read_bytes() == run_there.store.get_bytes(run_there.at("report/report.html"))
    assert outputs["html"]["metadata"]["results"] == 2
