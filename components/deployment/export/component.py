from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def export(
    backbone: str,
    format: str,
    destination: str,
    exported: dsl.Output[dsl.Model],
    regions: bool = False,
):
    """Export a published backbone to a format of another tool: timm, ONNX, or torch.export.

    The export is loaded with that tool, and its features are compared with the backbone's on random images. If they
    differ by more than the format's tolerance, nothing is published. A repeated step with the same backbone finds the
    export and returns.

    Args:
        backbone: Backbone at s3://bucket/prefix, or a pointer such as champion.
        format: One of safetensors, timm, onnx, torch-export.
        destination: Folder for the export, s3://bucket/prefix.
        regions: Add the region features as a second output of onnx and torch-export.

    Returns:
        exported: The exported files; the metadata holds the largest differences.
    """
    from esvit_core.errors import step

    with step("export"):
        from esvit_core.artifacts import point_to
        from esvit_core.storage import ObjectStore
        from esvit_core.weights.formats.publish_exports import publish_export

        manifest = publish_export(backbone, format, destination, regions, ObjectStore.from_env())
        point_to(
            exported,
            destination,
            format=format,
            backbone=manifest["backbone"],
            view_difference=manifest["differences"]["view"],
            regions_difference=manifest["differences"]["regions"],
        )
