from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def embed(
    backbone: str,
    data: str,
    destination: str,
    features: dsl.Output[dsl.Dataset],
    regions: bool = False,
    precision: str = "float32",
    max_bad_fraction: float = 0.05,
):
    """Write the view features of images, and their regions' if wanted, as Parquet.

    They are prepared and computed as in the measured steps. Images that cannot be read are listed beside the file.
    Repeated with the same backbone, images and settings it finds the features and returns.

    Args:
        backbone: The backbone, s3://bucket/prefix, or a pointer such as champion.
        data: The images: s3://bucket/prefix, or a folder, tar or zip that the step can reach.
        destination: Folder for features.parquet, s3://bucket/prefix.
        regions: Write the map of regions too, as float16.
        precision: Arithmetic of the network: float32, bfloat16, or auto, which is bfloat16 where it is native.
        max_bad_fraction: Share of unreadable images that is an error.

    Returns:
        features: The file; the metadata counts the images and the bad ones.
    """
    from esvit_core.errors import step

    with step("embed"):
        from esvit_core.artifacts import point_to
        from esvit_core.embedding.embed import EmbedSettings
        from esvit_core.embedding.publish_features import publish_features
        from esvit_core.storage import ObjectStore

        settings = EmbedSettings(regions=regions, precision=precision, max_bad_fraction=max_bad_fraction)
        manifest = publish_features(backbone, data, destination, settings, ObjectStore.from_env())
        facts = {key: manifest[key] for key in ("backbone", "images", "width", "bad")}
        point_to(features, destination, **facts)
