from typing import NamedTuple

from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def import_backbone(
    backbone: str,
    source: str,
    recipe: str,
    model: dsl.Output[dsl.Model],
    settings: str = "",
    transfer: str = "",
    run_uri: str = "",
    cluster: str = "",
) -> NamedTuple("Outputs", [("run_uri", str)]):
    """Start a run that measures a backbone which exists, instead of training one.

    Writes the run's config.yaml, backbone/, baseline/ (the same network as drawn from the seed) and measured.json.
    The architecture and the size of the images are the backbone's. Repeated with the same arguments it finds the
    run and returns.

    Args:
        backbone: A pointer such as champion, a run, a published backbone, a .pth or .safetensors file, or timm:<name>.
        source: The images to measure on: folder, tar, zip, or s3://bucket/prefix.
        recipe: Name of a recipe (`esvit recipe list`), s3:// address of a YAML file, or YAML such as
            {evaluation: {knn_k: [20]}}; its sections model and init do not count.
        settings: Changes of the recipe, with commas between, such as evaluation.batch_size=32, seed=1.
        transfer: Labelled sets to measure on, with commas between, such as digits=s3://my-bucket/digits.
        run_uri: Address of the run; empty means that backbone, configuration and data determine it.
        cluster: Sections cluster and launch with which the pipeline was compiled, YAML; empty means none.

    Returns:
        model: The backbone; its metadata says where it comes from.
        run_uri: Where the run lies.
    """
    from esvit_core.errors import step

    with step("import backbone"):
        from esvit_core.artifacts import point_to
        from esvit_core.config.parameters import resolve
        from esvit_core.evaluation.import_backbone import import_backbone
        from esvit_core.runs.run import MEASURED
        from esvit_core.storage import ObjectStore

        store = ObjectStore.from_env()
        config = resolve(recipe, settings, transfer, cluster, store.get_bytes)
        run = import_backbone(backbone, source, config, run_uri, store)
        taken = run.store.get_json(run.at(MEASURED))
        point_to(model, run.at("backbone"), arch=run.config.model.arch, taken_from=taken["backbone"])

    return (run.uri,)
