from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def prepare_transfer(run_uri: str, sets: dsl.Output[dsl.Dataset]):
    """Turn the labelled sets of the transfer protocol into shards in the object store, one after the other.

    The run's configuration names the sets (evaluation.transfer). Writes transfer/<set>/manifest.json and
    transfer/<set>/shards/ of the run. A repeated step finds the sets that are complete and goes on with the others.

    Args:
        run_uri: The run, s3://bucket/runs/name.

    Returns:
        sets: The shards; its metadata has the counts and the fingerprint of each set.
    """
    from esvit_core.errors import step

    with step("prepare transfer sets"):
        from esvit_core.artifacts import point_to
        from esvit_core.data.ingest.prepare import prepare
        from esvit_core.retraining.prepare_new_data import earlier_set
        from esvit_core.runs.run import open_run

        run = open_run(run_uri)
        # The limit on the number of images is meant for those that the network is trained on.
        limits = run.config.data.model_copy(update={"max_images": None})
        prepared = {}
        for wanted in run.config.evaluation.transfer:
            print(f"{wanted.name}: {wanted.source}", flush=True)
            base = earlier_set(run, wanted.name, limits)
            manifest = prepare(wanted.source, run.store, run.at("transfer", wanted.name), limits, base=base)
            prepared[wanted.name] = manifest.summary()
        if not prepared:
            print("nothing to do: the run has no transfer sets", flush=True)
        point_to(sets, run.at("transfer"), **prepared)
