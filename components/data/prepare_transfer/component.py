from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def prepare_transfer(run_uri: str, set_name: str, dataset: dsl.Output[dsl.Dataset]):
    """Turn a labelled set for the transfer protocol into shards in the object store.

    Writes transfer/<set>/manifest.json and transfer/<set>/shards/ of the run. Repeated with the same source it finds
    the shards and returns.

    Args:
        run_uri: The run, s3://bucket/runs/name.
        set_name: Name of a set in the configuration's evaluation.transfer, which says where its pictures are.

    Returns:
        dataset: The shards; its metadata has the counts and the fingerprint.
    """
    from esvit_core.errors import step

    with step(f"prepare {set_name}"):
        from esvit_core.artifacts import point_to
        from esvit_core.data.prepare import prepare
        from esvit_core.retraining.data import earlier_set
        from esvit_core.runs import open_run

        run = open_run(run_uri)
        place = run.at("transfer", set_name)
        # The limit on the number of pictures is meant for the pictures that the network is trained on.
        limits = run.config.data.model_copy(update={"max_images": None})
        base = earlier_set(run, set_name, limits)
        manifest = prepare(run.transfer_set(set_name).source, run.store, place, limits, base=base)
        point_to(dataset, place, **manifest.summary())
