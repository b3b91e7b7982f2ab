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
    """Write the view features of images, and optionally their region features, to a Parquet file.

    They are computed as in the evaluation steps. Unreadable images are listed beside the file. A repeated step with the
    same backbone, images and settings finds the features and returns.

    Args:
        backbone: Backbone at s3://bucket/prefix, or a pointer such as champion.
        data: Images: s3://bucket/prefix, or a folder, tar or zip that the step can read.
        destination: Folder for features.parquet, s3://bucket/prefix.
        regions: Write the region features too, as float16.
        precision: Arithmetic of the network: float32, bfloat16, or auto, which is bfloat16 where it is native.
        max_bad_fraction: The step fails if a larger share of the images is unreadable.

    Returns:
        features: The file; the metadata holds the numbers of images and of unreadable ones.
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
