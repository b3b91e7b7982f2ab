"""The pipeline that measures a backbone which exists, with the steps of the one that trains.

import backbone -> prepare data          -> extract features -> k-NN, linear probe -> report
              -> prepare transfer sets -> transfer                               ->
                                       -> images                               ->
"""

from typing import Any

from kfp import dsl

from esvit_components.data.prepare_data import prepare_data
from esvit_components.evaluation.import_backbone import import_backbone
from esvit_components.reporting.report import report
from esvit_core.config import Config
from esvit_core.config.parameters import PLACE, cluster_text, parameters_of
from esvit_pipelines.steps import Steps, measure, prepare_sets

PIPELINE_NAME = "esvit-evaluate"


def build_evaluate_pipeline(config: Config, *, cluster: bool = False) -> Any:
    """Define the pipeline of one configuration.

    Args:
        config: the defaults of ``recipe``, ``settings`` and ``transfer``; its sections ``cluster`` and ``launch`` shape
            the pipeline, nothing else of it does.
        cluster: place the steps on a cluster.

    Returns:
        The pipeline, a kfp ``GraphComponent``.

    Raises:
        UserError: for a cluster, and the cluster extra is not installed.
    """
    steps, default = Steps(config, cluster), parameters_of(config, without=PLACE if cluster else ())
    place = cluster_text(config) if cluster else ""

    @dsl.pipeline(name=PIPELINE_NAME, display_name="EsViT: measure a backbone")
    def evaluate_pipeline(  # type: ignore[no-untyped-def]
        data: str,
        backbone: str = "champion",
        recipe: str = default.recipe,
        settings: str = default.settings,
        transfer: str = default.transfer,
        run_uri: str = "",
    ):
        """Measure a vision backbone that exists on labelled images, beside the same network untrained, and report it.

        Args:
            data: The images to measure on, one folder a class: s3://bucket/prefix, or a folder, tar or zip that the
                steps can reach.
            backbone: Which one: a pointer such as champion; s3://bucket/runs/name, also of a run that still trains; a
                published backbone at s3://; a .pth or .safetensors file at s3://; or timm:name.
            recipe: How to measure: the name of a recipe, such as demo or imagenet_swin_tiny_w7 (`esvit recipe list`);
                the s3:// address of a YAML file; or YAML in one line, such as {evaluation: {knn_k: [20]}}. The
                architecture and the size of the images are the backbone's.
            settings: Changes of the recipe, with commas between: evaluation.linear.epochs=50, seed=1. A setting can be
                null: data.max_images=null. What the recipe says about all others holds, null included.
            transfer: Labelled sets to measure on besides, with commas between: digits=s3://my-bucket/digits. Empty means
                those of the recipe, as a rule none.
            run_uri: Address of the run in the object store, s3://bucket/runs/name. Empty, as a rule: backbone,
                configuration and data determine it, so that the same run is found again.
        """
        taken = steps.add(
            import_backbone(
                backbone=backbone,
                source=data,
                recipe=recipe,
                settings=settings,
                transfer=transfer,
                run_uri=run_uri,
                cluster=place,
            ),
            "import backbone",
            "publish",
        )
        run = taken.outputs["run_uri"]
        prepared = steps.add(prepare_data(source=data, run_uri=run), "prepare data", "prepare")
        sets = prepare_sets(steps, run)
        measured = measure(steps, run, prepared.outputs["dataset"], taken.outputs["model"], sets)
        steps.add(report(run_uri=run, results=[task.outputs["result"] for task in measured]), "report", "publish")

    return evaluate_pipeline
