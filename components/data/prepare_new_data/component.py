from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def prepare_new_data(run_uri: str, found: dsl.Input[dsl.Artifact], dataset: dsl.Output[dsl.Dataset]):
    """Read, check and store the images that are new, and take over the others from earlier data by reference.

    The held-out images of earlier data stay held out; of the new ones the share that data.val_fraction says is held
    out, by their names. Writes data/ of the run. Repeated it finds the shards and returns.

    Args:
        run_uri: The run, s3://bucket/runs/name.
        found: What is new.

    Returns:
        dataset: The shards, old and new; its metadata has the counts and the fingerprint.
    """
    from esvit_core.errors import step

    with step("prepare new data"):
        from esvit_core.artifacts import point_to
        from esvit_core.retraining.prepare_new_data import prepare_new
        from esvit_core.runs.run import open_run

        run = open_run(run_uri)
        manifest = prepare_new(run)
        point_to(dataset, run.at("data"), **manifest.summary())
