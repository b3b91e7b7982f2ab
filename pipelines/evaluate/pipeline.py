"""The pipeline that evaluates an existing backbone, with the evaluation steps of the pretrain pipeline.

import backbone -> prepare data          -> extract features -> k-NN, linear probe -> report
              -> prepare transfer sets -> transfer                               ->
                                       -> visualize                            ->
"""

from typing import Any

from kfp import dsl

from esvit_components.data.prepare_data import prepare_data
from esvit_components.evaluation.import_backbone import import_backbone
from esvit_components.reporting.report import report
from esvit_core.config import Config
from esvit_core.config.parameters import COMPILED_SECTIONS, compiled_sections_yaml, to_parameters
from esvit_pipelines.steps import Steps, evaluate, prepare_images, prepare_sets

PIPELINE_NAME = "esvit-evaluate"


def build_evaluate_pipeline(config: Config, *, cluster: bool = False) -> Any:
    """Build the pipeline for a configuration.

    Args:
        config: defaults of ``recipe``, ``settings`` and ``transfer``; only its sections ``cluster`` and ``launch`` affect
            the compiled pipeline otherwise.
        cluster: configure the pods of the steps for a cluster.

    Returns:
        The pipeline, a kfp ``GraphComponent``.

    Raises:
        UserError: ``cluster`` is true and the cluster extra is not installed.
    """
    steps, default = Steps(config, cluster), to_parameters(config, without=COMPILED_SECTIONS if cluster else ())
    overrides = compiled_sections_yaml(config) if cluster else ""

    @dsl.pipeline(name=PIPELINE_NAME, display_name="EsViT: evaluate a backbone")
    def evaluate_pipeline(  # type: ignore[no-untyped-def]
        data: str,
        backbone: str = "champion",
        recipe: str = default.recipe,
        settings: str = default.settings,
        transfer: str = default.transfer,
        run_uri: str = "",
    ):
        """Evaluate an existing vision backbone on labelled images, compare it with its baseline, and write a report.

        Args:
            data: Images to evaluate on, one folder per class: s3://bucket/prefix, or a folder, tar or zip that the steps
                can read.
            backbone: Backbone to evaluate: a pointer such as champion; s3://bucket/runs/name, even of a run that is still
                training; a published backbone at s3://; a .pth or .safetensors file at s3://; timm:name; or a file of
                features at s3://, .parquet, .npz or .npy.
            recipe: Evaluation settings: the name of a recipe, such as demo or imagenet_swin_tiny_w7 (`esvit recipe
                list`); the s3:// address of a YAML file; or YAML in one line, such as {evaluation: {knn_k: [20]}}. The
                architecture and the image size are those of the backbone.
            settings: Overrides of the recipe, separated by commas: evaluation.linear.epochs=50, seed=1. A setting can be
                null: data.max_images=null. All other settings are those of the recipe, including nulls.
            transfer: Additional labelled sets to evaluate on, separated by commas: digits=s3://my-bucket/digits. Empty
                means those of the recipe, usually none.
            run_uri: Address of the run in the object store, s3://bucket/runs/name. Usually empty: it is derived from
                backbone, configuration and data, so that the same arguments find the same run.
        """
        imported = steps.add(
            import_backbone(
                backbone=backbone,
                source=data,
                recipe=recipe,
                settings=settings,
                transfer=transfer,
                run_uri=run_uri,
                cluster=overrides,
            ),
            "import backbone",
            "publish",
        )
        run = imported.outputs["run_uri"]
        prepared = prepare_images(steps, prepare_data, "prepare data", source=data, run_uri=run)
        sets = prepare_sets(steps, run)
        evaluations = evaluate(steps, run, prepared.outputs["dataset"], imported.outputs["model"], sets)
        steps.add(report(run_uri=run, results=[task.outputs["result"] for task in evaluations]), "report", "publish")

    return evaluate_pipeline
