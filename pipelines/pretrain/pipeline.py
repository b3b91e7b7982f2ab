"""The pipeline: from images to a measured, published backbone.

prepare data, prepare transfer sets -> pretrain -> extract features -> k-NN         -> report -> promote
                                                                    -> linear probe ->
                                                -> transfer                         ->
                                                -> images                         ->

The same function runs on one machine (`esvit run`, through kfp.local) and is compiled for a cluster (`esvit compile`).
"""

from typing import Any

from kfp import dsl

from esvit_components.data.prepare_data import prepare_data
from esvit_components.deployment.promote import promote
from esvit_components.reporting.report import report
from esvit_core.config import Config
from esvit_core.config.parameters import PLACE, cluster_text, parameters_of
from esvit_pipelines.steps import Steps, measure, prepare_sets, train

PIPELINE_NAME = "esvit-pretrain"


def build_pretrain_pipeline(config: Config, *, cluster: bool = False) -> Any:
    """Define the pipeline of one configuration.

    Args:
        config: the defaults of ``recipe``, ``settings`` and ``transfer``; its sections ``cluster`` and ``launch`` shape
            the pipeline, nothing else of it does.
        cluster: place the steps on a cluster, with keys from the Kubernetes secrets that the configuration names.

    Returns:
        The pipeline, a kfp ``GraphComponent``: call it to run it locally, or compile it.

    Raises:
        UserError: for a cluster, and the cluster extra is not installed.
    """
    steps, default = Steps(config, cluster), parameters_of(config, without=PLACE if cluster else ())
    place = cluster_text(config) if cluster else ""

    @dsl.pipeline(name=PIPELINE_NAME, display_name="EsViT: pre-train, measure, publish")
    def pretrain_pipeline(  # type: ignore[no-untyped-def]
        data: str,
        recipe: str = default.recipe,
        settings: str = default.settings,
        transfer: str = default.transfer,
        run_uri: str = "",
    ):
        """Pre-train a vision backbone on unlabelled images (EsViT), measure it, report it, and publish it.

        Args:
            data: The images: s3://bucket/prefix, or a folder, tar or zip that the steps can reach. One folder a class
                where there are labels.
            recipe: What to train: the name of a recipe, such as demo or imagenet_swin_tiny_w7 (`esvit recipe list`);
                the s3:// address of a YAML file; or YAML in one line, such as {model: {arch: swin_tiny_w7}}.
            settings: Changes of the recipe, with commas between: training.epochs=50, seed=1. A setting can be null:
                promotion.max_loss=null. What the recipe says about all others holds, null included.
            transfer: Labelled sets to measure on besides, with commas between: digits=s3://my-bucket/digits. Empty means
                those of the recipe, as a rule none.
            run_uri: Address of the run in the object store, s3://bucket/runs/name. Empty, as a rule: configuration and
                data determine it, so that the same run is found again and continued.
        """
        prepared = steps.add(
            prepare_data(
                source=data, recipe=recipe, settings=settings, transfer=transfer, run_uri=run_uri, cluster=place
            ),
            "prepare data",
            "prepare",
        )
        run = prepared.outputs["run_uri"]
        sets = prepare_sets(steps, run)
        model = train(steps, run, prepared.outputs["dataset"], sets).outputs["model"]
        measured = measure(steps, run, prepared.outputs["dataset"], model, sets)
        told = steps.add(
            report(run_uri=run, results=[task.outputs["result"] for task in measured]), "report", "publish"
        )
        steps.add(promote(run_uri=run, model=model, report=told.outputs["html"]), "promote", "publish")

    return pretrain_pipeline
