from typing import NamedTuple

from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def find_new_data(
    source: str,
    recipe: str,
    owner: str,
    found: dsl.Output[dsl.Artifact],
    settings: str = "",
    transfer: str = "",
    cluster: str = "",
) -> NamedTuple("Outputs", [("run_uri", str), ("nothing", bool), ("message", str)]):
    """Compare the images of a source with those of earlier retrainings, and start or resume a retraining.

    With fewer new images than retrain.min_new_images there is nothing to do: the run is then the previous one, which is
    finished, and every later step finds its outputs. Of two concurrent retrainings, one continues; the other one fails
    with a message that names the owner of the lease.

    Args:
        source: Folder, tar, zip, or s3://bucket/prefix; labelled images lie in one folder per class.
        recipe: Name of a recipe (`esvit recipe list`), s3:// address of a YAML file, or YAML such as
            {training: {epochs: 50}}.
        owner: Owner of the lease, such as the id of the KFP run; the same owner can resume the retraining.
        settings: Overrides of the recipe, separated by commas, such as retrain.min_new_images=500, seed=1.
        transfer: Labelled sets to evaluate on, separated by commas, such as digits=s3://my-bucket/digits.
        cluster: Sections cluster and launch that the pipeline was compiled with, as YAML; empty means none.

    Returns:
        found: Numbers of new, changed and removed files, and whether there is nothing to do.
        run_uri: Address of the retraining's run.
        nothing: Whether there is nothing to do.
        message: The result in one sentence.
    """
    from esvit_core.errors import step

    with step("find new data"):
        import dataclasses

        from esvit_core.artifacts import point_to
        from esvit_core.config.parameters import resolve
        from esvit_core.planning.feasibility import require_possible
        from esvit_core.retraining.find_new_data import find_new
        from esvit_core.storage import ObjectStore

        store = ObjectStore.from_env()
        config = resolve(recipe, settings, transfer, cluster, store.get_bytes)
        require_possible(config)
        result = find_new(config, source, owner, store)
        point_to(found, result.run, **dataclasses.asdict(result))
        print(result.message, flush=True)

    return (result.run, result.nothing, result.message)
