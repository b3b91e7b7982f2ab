from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def pretrain(
    run_uri: str,
    dataset: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Artifact],
):
    """Pre-train a backbone without labels: EsViT's view and region tasks (ICLR 2022).

    Launches one training process per GPU (or core) and waits for them. Checkpoints are written to the object store; a
    repeated step resumes from the newest valid one. Writes training/, baseline/ and backbone/ of the run.

    Args:
        run_uri: Address of the run, s3://bucket/runs/name.
        dataset: The shards of the images.

    Returns:
        model: The backbone of the trained teacher, as safetensors with a description.
        metrics: Numbers of steps, images and seconds, and the loss.
    """
    from esvit_core.errors import step

    with step("pretrain"):
        from esvit_core.artifacts import log_metrics, point_to
        from esvit_core.runs.run import open_run

        run = open_run(run_uri)

        def train():
            from esvit_core.launch.launcher import launch_training

            launch_training(run.uri, run.config)

        summary = run.once("training/summary.json", train)
        numbers = {name: value for name, value in summary.items() if type(value) in (int, float)}
        log_metrics(metrics, numbers)
        point_to(
            model,
            run.at("backbone"),
            arch=run.config.model.arch,
            framework="PyTorch",
            format="safetensors",
            precision=summary.get("precision"),
        )
