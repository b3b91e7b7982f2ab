from typing import NamedTuple

from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def visualize(
    run_uri: str,
    dataset: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    drawings: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Artifact],
) -> NamedTuple("Outputs", [("result", str)]):
    """Draw the correspondence between regions of two crops, and the attention maps of the last block.

    Writes visualization/ of the run: the figures, and visualization.json with the correspondence accuracy.

    Args:
        run_uri: The run, s3://bucket/runs/name.
        dataset: The shards of the images.
        model: The trained teacher.

    Returns:
        drawings: The figures.
        metrics: Correspondence accuracy in percent, and that of the baseline.
        result: Address of visualization.json in the object store.
    """
    from esvit_core.errors import step

    with step("visualize"):
        from esvit_core.artifacts import log_metrics, point_to
        from esvit_core.runs.run import open_run

        run = open_run(run_uri)

        def draw():
            from esvit_core.evaluation.visualize import visualize as draw_visualization

            draw_visualization(run.uri, run.store, run.config)

        run.once("visualization/manifest.json", draw)
        drawn = run.store.get_json(run.at("visualization/visualization.json"))
        figures = {}
        for figure, values in drawn["figures"].items():
            figures |= {figure: values["trained"], f"{figure} (baseline)": values["baseline"]}
        log_metrics(metrics, figures)
        point_to(drawings, run.at("visualization"), images=len(drawn["images"]))

    return (run.at("visualization/visualization.json"),)
