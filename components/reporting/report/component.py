from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def report(run_uri: str, results: list[str], html: dsl.Output[dsl.HTML], metrics: dsl.Output[dsl.Metrics]):
    """Write the report of a run to one self-contained HTML file: data, recipe, curves, tables with baselines, images.

    Writes report/report.html of the run, report.md and report.json with the figures, and the model card of the backbone,
    model-card.md. The report lists skipped evaluations with the reason.

    Args:
        run_uri: Address of the run, s3://bucket/runs/name.
        results: Addresses of the results of the evaluation steps, which the report waits for.

    Returns:
        html: The report, which the Kubeflow UI displays.
        metrics: All metrics of the run in one artifact, so that the page Compare runs shows a run as one column.
    """
    from esvit_core.errors import step

    with step("report"):
        from pathlib import Path

        from esvit_core.artifacts import describe, log_metrics
        from esvit_core.reporting.figures import figures_of_run
        from esvit_core.runs.run import open_run

        run = open_run(run_uri)
        address = run.at("report/report.html")
        if run.store.exists(address):
            print("already done: found report/report.html", flush=True)
            text = run.store.get_bytes(address).decode()
        else:
            from esvit_core.reporting.report import write_report

            text = write_report(run.uri, run.store, run.config)
        # The UI displays the content of the artifact itself, so the file is written to KFP's path too.
        Path(html.path).write_text(text, encoding="utf-8")
        describe(html, uri=address, results=len(results))
        log_metrics(metrics, figures_of_run(run.uri, run.store))
