from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def report(run_uri: str, results: list[str], html: dsl.Output[dsl.HTML], metrics: dsl.Output[dsl.Metrics]):
    """Tell the run in one self-contained HTML file: data, recipe, curves, tables with their baseline, images.

    Writes report/report.html of the run. What was left out is in it, with the reason.

    Args:
        run_uri: The run, s3://bucket/runs/name.
        results: Addresses of the results, from the steps that measured; the report waits for them.

    Returns:
        html: The report, shown by the Kubeflow UI.
        metrics: Every figure of the run in one place, for the page Compare runs: a run is one column there.
    """
    from esvit_core.errors import step

    with step("report"):
        from pathlib import Path

        from esvit_core.artifacts import describe, log_metrics
        from esvit_core.reporting.figures import figures_of_run
        from esvit_core.runs.run import open_run

        run = open_run(run_uri)
        place = run.at("report/report.html")
        if run.store.exists(place):
            print("already done: found report/report.html", flush=True)
            text = run.store.get_bytes(place).decode()
        else:
            from esvit_core.reporting.report import write_report

            text = write_report(run.uri, run.store, run.config)
        # The UI shows what is in the artifact itself, so this one stays where KFP wants it.
        Path(html.path).write_text(text, encoding="utf-8")
        describe(html, uri=place, results=len(results))
        log_metrics(metrics, figures_of_run(run.uri, run.store))
