from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def prepare_new_data(run_uri: str, found: dsl.Input[dsl.Artifact], dataset: dsl.Output[dsl.Dataset], share: str = ""):
    """Read, check and store the new images, and reuse the shards of earlier data by reference.

    Images that were held out stay held out; of the new ones, the share data.val_fraction is held out, selected by name.
    Writes data/ of the run. A repeated step finds the shards and returns.

    Args:
        run_uri: Address of the run, s3://bucket/runs/name.
        found: The new images, from the step find new data.
        share: Share of the images to prepare, such as 2/4; a last step without it puts them together. Empty means all.

    Returns:
        dataset: The old and new shards; the metadata holds the counts and the fingerprint.
    """
    from esvit_core.errors import step

    with step("prepare new data"):
        from esvit_core.artifacts import point_to
        from esvit_core.data.ingest.parts import Share
        from esvit_core.retraining.prepare_new_data import prepare_new
        from esvit_core.runs.run import open_run

        run = open_run(run_uri)
        manifest = prepare_new(run, Share.parse(share) if share else None)
        point_to(dataset, run.at("data"), **(manifest.summary() if manifest else {}))
