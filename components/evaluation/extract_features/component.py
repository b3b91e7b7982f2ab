from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def extract_features(
    run_uri: str,
    dataset: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    features: dsl.Output[dsl.Dataset],
):
    """Extract the features of all images with the trained network and with the baseline (its initial weights).

    Writes features/ of the run: one safetensors file per network and split, with the view features, the features of
    the last blocks, and the labels.

    Args:
        run_uri: The run, s3://bucket/runs/name.
        dataset: The shards of the images.
        model: The trained teacher.

    Returns:
        features: The feature files.
    """
    from esvit_core.errors import step

    with step("extract features"):
        from esvit_core.artifacts import point_to
        from esvit_core.runs.run import open_run

        run = open_run(run_uri)

        def extract():
            from esvit_core.evaluation.stored_features import extract_features

            extract_features(run.uri, run.store, run.config)

        manifest = run.once("features/manifest.json", extract)
        point_to(features, run.at("features"), samples=manifest["samples"])
