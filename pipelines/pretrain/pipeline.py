"""The pipeline: from pictures to a measured, published backbone.

prepare data, prepare <set> ... -> pretrain -> extract features -> k-NN        -> report -> promote
                                                                -> linear probe ->
                                            -> transfer <set> ...              ->
                                            -> pictures                        ->

The same function runs on one machine (`esvit run`, through kfp.local) and is compiled for a cluster (`esvit compile`).
"""

from typing import Any

from kfp import dsl

from esvit_components.data.prepare_data import prepare_data
from esvit_components.deployment.promote import promote
from esvit_components.reporting.report import report
from esvit_core.config import Config
from esvit_pipelines.steps import Steps, measure, pipeline_nulls, pipeline_values, prepare_sets, train

PIPELINE_NAME = "esvit-pretrain"


def build_pretrain_pipeline(config: Config, *, cluster: bool = False) -> Any:
    """Define the pipeline of one configuration.

    Args:
        config: its transfer sets and its section ``cluster`` shape the pipeline; as a whole it is the default of
            ``configuration``.
        cluster: place the steps on a cluster, with keys from the Kubernetes secrets that the configuration names.

    Returns:
        The pipeline, a kfp ``GraphComponent``: call it to run it locally, or compile it.

    Raises:
        UserError: for a cluster, and the cluster extra is not installed.
    """
    values, nulls = pipeline_values(config), pipeline_nulls(config)
    steps = Steps(config, cluster)

    @dsl.pipeline(name=PIPELINE_NAME, display_name="EsViT: pre-train, measure, publish")
    def pretrain_pipeline(  # type: ignore[no-untyped-def]
        data: str, settings: str = nulls, configuration: dict = values, run_uri: str = ""
    ):
        """Pre-train a vision backbone on unlabelled pictures (EsViT), measure it, report it, and publish it.

        Args:
            data: The pictures: s3://bucket/prefix, or a folder, tar or zip that the steps can reach.
            settings: What to change in the configuration, as after --set on the command line, with spaces between:
                training.epochs=50 seed=1. Which transfer sets there are cannot be changed here.
            configuration: The whole configuration of the run, as `esvit recipe show` prints it; what is not in it has
                its default. The names of the transfer sets were fixed when this was compiled.
            run_uri: Where the run lies in the object store, s3://bucket/runs/name; empty means the place that
                configuration and data determine, so that the same run is found again and continued.
        """
        prepared = steps.add(
            prepare_data(source=data, configuration=configuration, run_uri=run_uri, settings=settings),
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
