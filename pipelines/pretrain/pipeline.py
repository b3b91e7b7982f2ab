"""The pipeline that pre-trains a backbone on images, evaluates it, and publishes it.

prepare data, prepare transfer sets -> pretrain -> extract features -> k-NN         -> report -> promote
                                                                    -> linear probe ->
                                                -> transfer                         ->
                                                -> visualize                      ->

The same function runs on one machine (`esvit run`, through kfp.local) and is compiled for a cluster (`esvit compile`).
"""

from typing import Any

from kfp import dsl

from esvit_components.data.prepare_data import prepare_data
from esvit_components.deployment.promote import promote
from esvit_components.reporting.report import report
from esvit_core.config import Config
from esvit_core.config.parameters import COMPILED_SECTIONS, Parameters, compiled_sections_yaml, to_parameters
from esvit_pipelines.steps import Steps, evaluate, prepare_images, prepare_sets, train

PIPELINE_NAME = "esvit-pretrain"


def build_pretrain_pipeline(config: Config, *, cluster: bool = False, form: Parameters | None = None) -> Any:
    """Build the pipeline for a configuration.

    Args:
        config: defaults of ``recipe``, ``settings`` and ``transfer``; only its sections ``cluster`` and ``launch`` affect
            the compiled pipeline otherwise.
        cluster: configure the pods of the steps for a cluster, with keys from the Kubernetes secrets that ``config`` names.
        form: other defaults of ``recipe``, ``settings`` and ``transfer``, for the form of Kubeflow's UI.

    Returns:
        The pipeline, a kfp ``GraphComponent``: call it to run it locally, or compile it.

    Raises:
        UserError: ``cluster`` is true and the cluster extra is not installed.
    """
    steps = Steps(config, cluster)
    default = form or to_parameters(config, without=COMPILED_SECTIONS if cluster else ())
    overrides = compiled_sections_yaml(config) if cluster else ""

    @dsl.pipeline(name=PIPELINE_NAME, display_name="EsViT: pre-train, evaluate, publish")
    def pretrain_pipeline(  # type: ignore[no-untyped-def]
        data: str,
        recipe: str = default.recipe,
        settings: str = default.settings,
        transfer: str = default.transfer,
        run_uri: str = "",
    ):
        """Pre-train a vision backbone on unlabelled images (EsViT), evaluate it, write a report, and publish it.

        Args:
            data: Images: s3://bucket/prefix, or a folder, tar or zip that the steps can read. Labelled images lie in one
                folder per class.
            recipe: Training settings: auto, or auto:hours=8, to choose them from the images and the pods; the name of a
                recipe, such as demo or imagenet_swin_tiny_w7 (`esvit recipe list`); the s3:// address of a YAML file; or
                YAML in one line, such as {model: {arch: swin_tiny_w7}}.
            settings: Overrides of the recipe, separated by commas: training.epochs=50, seed=1. A setting can be null:
                promotion.max_loss=null. All other settings are those of the recipe, including nulls.
            transfer: Additional labelled sets to evaluate on, separated by commas: digits=s3://my-bucket/digits. Empty
                means those of the recipe, usually none.
            run_uri: Address of the run in the object store, s3://bucket/runs/name. Usually empty: it is derived from
                configuration and data, so that the same arguments find and resume the same run.
        """
        prepared = prepare_images(
            steps,
            prepare_data,
            "prepare data",
            source=data,
            recipe=recipe,
            settings=settings,
            transfer=transfer,
            run_uri=run_uri,
            cluster=overrides,
        )
        run = prepared.outputs["run_uri"]
        sets = prepare_sets(steps, run)
        model = train(steps, run, prepared.outputs["dataset"], sets).outputs["model"]
        evaluations = evaluate(steps, run, prepared.outputs["dataset"], model, sets)
        written = steps.add(
            report(run_uri=run, results=[task.outputs["result"] for task in evaluations]), "report", "publish"
        )
        steps.add(promote(run_uri=run, model=model, report=written.outputs["html"]), "promote", "publish")

    return pretrain_pipeline
