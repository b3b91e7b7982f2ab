"""The pipeline that measures a backbone which exists, with the steps of the one that trains.

take backbone -> prepare data    -> extract features -> k-NN, linear probe -> report
              -> prepare <set> ... -> transfer <set> ...                   ->
                                    -> pictures                            ->
"""

from typing import Any

from kfp import dsl

from esvit_components.data.prepare_data import prepare_data
from esvit_components.evaluation.take_backbone import take_backbone
from esvit_components.reporting.report import report
from esvit_core.config import Config
from esvit_pipelines.steps import Steps, measure, pipeline_nulls, pipeline_values, prepare_sets

PIPELINE_NAME = "esvit-evaluate"


def build_evaluate_pipeline(config: Config, *, cluster: bool = False) -> Any:
    """Define the pipeline of one configuration.

    Args:
        config: its transfer sets and its section ``cluster`` shape the pipeline; as a whole it is the default of
            ``configuration``.
        cluster: place the steps on a cluster.

    Returns:
        The pipeline, a kfp ``GraphComponent``.

    Raises:
        UserError: for a cluster, and the cluster extra is not installed.
    """
    values, nulls = pipeline_values(config), pipeline_nulls(config)
    steps = Steps(config, cluster)

    @dsl.pipeline(name=PIPELINE_NAME, display_name="EsViT: measure a backbone")
    def evaluate_pipeline(  # type: ignore[no-untyped-def]
        data: str, backbone: str = "champion", settings: str = nulls, configuration: dict = values, run_uri: str = ""
    ):
        """Measure a vision backbone that exists on labelled pictures, beside the same network untrained, and report it.

        Args:
            data: The pictures to measure on, one folder a class: s3://bucket/prefix, or a folder, tar or zip that the
                steps can reach.
            backbone: Which one: a pointer such as champion; s3://bucket/runs/name, also of a run that still trains; a
                published backbone at s3://; a .pth or .safetensors file at s3://; or timm:name.
            settings: What to change in the configuration, as after --set on the command line, with spaces between:
                evaluation.batch_size=32 seed=1. Which transfer sets there are cannot be changed here.
            configuration: The whole configuration, as `esvit recipe show` prints it. The architecture and the size of
                the pictures are the backbone's; the names of the transfer sets were fixed when this was compiled.
            run_uri: Where the run lies in the object store, s3://bucket/runs/name; empty means the place that
                backbone, configuration and data determine, so that the same run is found again.
        """
        taken = steps.add(
            take_backbone(
                backbone=backbone, source=data, configuration=configuration, settings=settings, run_uri=run_uri
            ),
            "take backbone",
            "publish",
        )
        run = taken.outputs["run_uri"]
        prepared = steps.add(prepare_data(source=data, configuration={}, run_uri=run), "prepare data", "prepare")
        sets = prepare_sets(steps, run)
        measured = measure(steps, run, prepared.outputs["dataset"], taken.outputs["model"], sets)
        steps.add(report(run_uri=run, results=[task.outputs["result"] for task in measured]), "report", "publish")

    return evaluate_pipeline
