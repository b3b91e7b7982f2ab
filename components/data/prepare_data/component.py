from typing import NamedTuple

from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def prepare_data(
    source: str,
    configuration: dict,
    dataset: dsl.Output[dsl.Dataset],
    run_uri: str = "",
    settings: str = "",
) -> NamedTuple("Outputs", [("run_uri", str)]):
    """Start the run and turn a folder, an archive or an S3 prefix of pictures into shards in the object store.

    Writes the run's config.yaml, data/manifest.json, data/shards/ and data/bad_files.jsonl. Repeated with the same
    source it finds the shards and returns.

    Args:
        source: Folder, tar, zip, or s3://bucket/prefix; with one folder a class where there are labels.
        configuration: The whole configuration, as `esvit recipe show` prints it; empty means that of the run, which
            was started before.
        run_uri: Where the run lies, s3://bucket/runs/name; empty means the place that configuration and data determine.
        settings: What to change in the configuration, such as training.epochs=50 seed=1.

    Returns:
        dataset: The shards; its metadata has the counts and the fingerprint.
        run_uri: Where the run lies.
    """
    from esvit_core.errors import step

    with step("prepare data"):
        from esvit_core.artifacts import point_to
        from esvit_core.data.prepare import prepare
        from esvit_core.runs import open_run, start_run

        started = run_uri and not configuration
        run = open_run(run_uri) if started else start_run(configuration, source, run_uri, settings=settings)
        manifest = prepare(source, run.store, run.at("data"), run.config.data, run.config.seed)
        point_to(dataset, run.at("data"), **manifest.summary())

    return (run.uri,)
