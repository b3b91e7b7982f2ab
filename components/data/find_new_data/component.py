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
) -> NamedTuple("Outputs", [("run_uri", str), ("nothing", bool), ("told", str)]):
    """Compare the images of a source with what earlier retrainings have taken, and begin or go on with a retraining.

    With fewer new images than retrain.min_new_images there is nothing to do: the run is then the last one, which is
    finished, and every later step finds its work done. Of two at once one goes on; the other ends and says who has it.

    Args:
        source: Folder, tar, zip, or s3://bucket/prefix; with one folder a class where there are labels.
        recipe: Name of a recipe (`esvit recipe list`), s3:// address of a YAML file, or YAML such as
            {training: {epochs: 50}}.
        owner: Who asks, such as the id of KFP's run; the same owner may begin again.
        settings: Changes of the recipe, with commas between, such as retrain.min_new_images=500, seed=1.
        transfer: Labelled sets to measure on, with commas between, such as digits=s3://my-bucket/digits.
        cluster: Sections cluster and launch with which the pipeline was compiled, YAML; empty means none.

    Returns:
        found: The counts of new, changed and gone files, and whether there is nothing to do.
        run_uri: The run to carry out.
        nothing: Whether there is nothing to do.
        told: What was found, in a sentence.
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
        seen = find_new(config, source, owner, store)
        point_to(found, seen.run, **dataclasses.asdict(seen))
        print(seen.told, flush=True)

    return (seen.run, seen.nothing, seen.told)
