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
    """Start a run that evaluates an existing backbone instead of training one.

    Writes the run's config.yaml, backbone/, baseline/ (the same network as drawn from the seed) and measured.json.
    The backbone determines the architecture and the image size. Rerunning the step with the same arguments
    finds the run and returns it.

    Args:
        backbone: A pointer such as champion, a run, a published backbone, a .pth or .safetensors file, timm:<name>, or
            features as .parquet, .npz or .npy, which take the place of a network.
        source: The images to evaluate on: folder, tar, zip, or s3://bucket/prefix.
        recipe: Name of a recipe (`esvit recipe list`), s3:// address of a YAML file, or YAML such as
            {evaluation: {knn_k: [20]}}; its sections model and init are ignored.
        settings: Overrides of the recipe, separated by commas, such as evaluation.batch_size=32, seed=1.
        transfer: Labelled sets to evaluate on, separated by commas, such as digits=s3://my-bucket/digits.
        run_uri: Address of the run; empty means that backbone, configuration and data determine it.
        cluster: Sections cluster and launch with which the pipeline was compiled, YAML; empty means none.

    Returns:
        model: The backbone; its metadata names its source.
        run_uri: Address of the run.
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
        arch = "none (features)" if taken.get("features") else run.config.model.arch
        point_to(model, run.at("backbone"), arch=arch, taken_from=taken["backbone"])

    return (run.uri,)
