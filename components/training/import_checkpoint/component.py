from typing import NamedTuple

from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def import_checkpoint(
    file: str,
    out: str,
    model: dsl.Output[dsl.Model],
    arch: str = "",
    recipe: str = "",
) -> NamedTuple("Outputs", [("backbone", str), ("checkpoint", str)]):
    """Import a checkpoint of the published EsViT, or timm weights, into the object store.

    Writes backbone/ and checkpoint/ below the destination: backbone/ for `load_backbone`, checkpoint/ for `init.source` of
    a run that starts from it. No code in the file is executed. A repeated step with the same file finds both and returns.

    Args:
        file: A .pth or .safetensors file at s3:// or on a volume of the step, or timm:<name>.
        out: Destination, s3://bucket/prefix.
        arch: Architecture; empty means inferred from the names and shapes of the weights.
        recipe: Name of a recipe, s3:// address of a YAML file, or YAML; its section model takes precedence over arch.

    Returns:
        model: The backbone; the metadata lists what was imported.
        backbone: Address of the backbone.
        checkpoint: Address of the checkpoint.
    """
    from esvit_core.errors import step

    with step("import checkpoint"):
        from esvit_core.artifacts import point_to
        from esvit_core.config import Config
        from esvit_core.config.parameters import resolve
        from esvit_core.storage import ObjectStore
        from esvit_core.weights.import_checkpoint import import_weights

        store, config = ObjectStore.from_env(), None
        if recipe:
            config = resolve(recipe, read=store.get_bytes)
        elif arch:
            config = Config.from_mapping({"recipe": "imported", "model": {"arch": arch}})
        imported = import_weights(file, out, store, config, checkpoint=True)
        for line in imported.messages:
            print(line, flush=True)
        point_to(model, imported.backbone, arch=imported.arch, message="; ".join(imported.messages))

    return (imported.backbone, imported.checkpoint)
