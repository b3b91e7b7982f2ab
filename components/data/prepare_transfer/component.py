from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def prepare_transfer(run_uri: str, sets: dsl.Output[dsl.Dataset]):
    """Convert the labelled sets of the transfer protocol to shards in the object store, one after the other.

    The run's configuration names the sets (evaluation.transfer). Writes transfer/<set>/manifest.json and
    transfer/<set>/shards/ of the run. A repeated step skips complete sets. In a retraining, images that the previous run
    has prepared with the same settings are reused by reference.

    Args:
        run_uri: Address of the run, s3://bucket/runs/name.

    Returns:
        sets: The shards; the metadata holds the counts and the fingerprint of each set.
    """
    from esvit_core.errors import step

    with step("prepare transfer sets"):
        from esvit_core.artifacts import point_to
        from esvit_core.data.ingest.transfer_set import prepare_transfer_set
        from esvit_core.retraining.prepare_new_data import earlier_set
        from esvit_core.runs.run import open_run

        run = open_run(run_uri)
        # data.max_images limits the training images only.
        limits = run.config.data.model_copy(update={"max_images": None})
        prepared = {}
        for transfer_set in run.config.evaluation.transfer:
            print(f"{transfer_set.name}: {transfer_set.source}", flush=True)
            base = earlier_set(run, transfer_set.name, limits)
            where = run.at("transfer", transfer_set.name)
            manifest = prepare_transfer_set(transfer_set, run.store, where, limits, base)
            prepared[transfer_set.name] = manifest.summary()
        if not prepared:
            print("nothing to do: the run has no transfer sets", flush=True)
        point_to(sets, run.at("transfer"), **prepared)
