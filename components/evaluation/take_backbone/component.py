from typing import NamedTuple

from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def take_backbone(
    backbone: str,
    source: str,
    configuration: dict,
    model: dsl.Output[dsl.Model],
    settings: str = "",
    run_uri: str = "",
) -> NamedTuple("Outputs", [("run_uri", str)]):
    """Start a run that measures a backbone which exists, instead of training one.

    Writes the run's config.yaml, backbone/, untrained/ (the same network as drawn from the seed) and measured.json.
    The architecture and the size of the pictures are the backbone's. Repeated with the same arguments it finds the
    run and returns.

    Args:
        backbone: A pointer such as champion, a run, a published backbone, a .pth or .safetensors file, or timm:<name>.
        source: The pictures to measure on: folder, tar, zip, or s3://bucket/prefix.
        configuration: The whole configuration, as `esvit recipe show` prints it; its sections model and init do not
            count.
        settings: What to change in the configuration, such as evaluation.batch_size=32 seed=1.
        run_uri: Where the run lies; empty means the place that backbone, configuration and data determine.

    Returns:
        model: The backbone; its metadata says where it comes from.
        run_uri: Where the run lies.
    """
    from esvit_core.errors import step

    with step("take backbone"):
        from esvit_core.artifacts import point_to
        from esvit_core.evaluation.existing import take_backbone
        from esvit_core.runs import MEASURED

        run = take_backbone(backbone, source, configuration, run_uri, settings)
        taken = run.store.get_json(run.at(MEASURED))
        point_to(model, run.at("backbone"), arch=run.config.model.arch, taken_from=taken["backbone"])

    return (run.uri,)
