from typing import NamedTuple

from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def prepare_data(
    source: str,
    dataset: dsl.Output[dsl.Dataset],
    recipe: str = "",
    settings: str = "",
    transfer: str = "",
    run_uri: str = "",
    cluster: str = "",
    share: str = "",
) -> NamedTuple("Outputs", [("run_uri", str)]):
    """Create the run, and convert a folder, an archive or an S3 prefix of images to shards in the object store.

    Writes the run's config.yaml, data/manifest.json, data/shards/ and the list of bad files. A repeated step with the
    same source finds the shards and returns.

    Args:
        source: Folder, tar, zip, or s3://bucket/prefix; labelled images lie in one folder per class.
        recipe: auto, or auto:hours=8: chosen from the images and the training's pods. Or the name of a recipe (`esvit
            recipe list`), s3:// address of a YAML file, or YAML such as {training: {epochs: 50}}; empty means that the
            run at run_uri exists.
        settings: Overrides of the recipe, separated by commas, such as training.epochs=50, seed=1.
        transfer: Labelled sets to evaluate on, separated by commas, such as digits=s3://my-bucket/digits.
        run_uri: Address of the run, s3://bucket/runs/name; empty means derived from configuration and data.
        cluster: Sections cluster and launch that the pipeline was compiled with, as YAML; empty means none.
        share: Share of the images to prepare, such as 2/4; a last step without it puts them together. Empty means all.

    Returns:
        dataset: The shards; the metadata holds the counts and the fingerprint.
        run_uri: Address of the run.
    """
    from esvit_core.errors import step

    with step("prepare data"):
        from esvit_core.artifacts import point_to
        from esvit_core.data.ingest.parts import Share
        from esvit_core.data.ingest.prepare import prepare, prepare_share
        from esvit_core.runs.run import open_run, start_run
        from esvit_core.storage import ObjectStore

        store = ObjectStore.from_env()
        if run_uri and not recipe:
            run = open_run(run_uri, store)
        else:
            from esvit_core.planning.auto_pods import resolve_parameters
            from esvit_core.planning.feasibility import require_possible

            config, chosen = resolve_parameters(recipe, settings, transfer, cluster, source, store)
            run = start_run(config, source, run_uri, store, check=require_possible)
            run.record_choice(chosen)
        if share:
            prepare_share(source, run.store, run.at("data"), run.config.data, Share.parse(share))
            point_to(dataset, run.at("data"))
        else:
            manifest = prepare(source, run.store, run.at("data"), run.config.data, run.config.seed)
            point_to(dataset, run.at("data"), **manifest.summary())

    return (run.uri,)
