from typing import NamedTuple

from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def pictures(
    run_uri: str,
    dataset: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    drawings: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("Outputs", [("result", str)]):
    """Draw which regions of two crops of a picture find each other, and where the last block attends.

    Writes pictures/ of the run: the drawings, and pictures.json with the measured share of right matches.

    Args:
        run_uri: The run, s3://bucket/runs/name.
        dataset: The shards of the pictures.
        model: The trained teacher.

    Returns:
        drawings: The drawings.
        metrics: Share of right matches in percent, correspondence, and of the baseline.
        result: Address of pictures.json in the object store.
    """
    from esvit_core.errors import step

    with step("pictures"):
        from esvit_core.artifacts import log_metrics, point_to
        from esvit_core.runs.run import open_run

        run = open_run(run_uri)

        def draw():
            from esvit_core.evaluation.visualize import draw_pictures

            draw_pictures(run.uri, run.store, run.config)

        run.once("pictures/manifest.json", draw)
        drawn = run.store.get_json(run.at("pictures/pictures.json"))
        figures = {}
        for figure, values in drawn["figures"].items():
            figures |= {figure: values["trained"], f"{figure} (baseline)": values["untrained"]}
        log_metrics(metrics, figures)
        point_to(drawings, run.at("pictures"), pictures=len(drawn["pictures"]))

    return (run.at("pictures/pictures.json"),)
