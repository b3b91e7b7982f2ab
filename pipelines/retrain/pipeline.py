"""The pipeline that runs again and again: from new pictures to a champion that has seen them, or not.

find new data -> prepare new data, prepare <set> ... -> pretrain -> as in the pipeline pretrain -> compare -> report -> promote

On a cluster nothing but the first step runs where nothing is new.
"""

from contextlib import nullcontext
from typing import Any

from kfp import dsl

from esvit_components.data.find_new_data import find_new_data
from esvit_components.data.prepare_new_data import prepare_new_data
from esvit_components.deployment.promote import promote
from esvit_components.evaluation.compare_champion import compare_champion
from esvit_components.reporting.report import report
from esvit_core.config import Config
from esvit_pipelines.steps import Steps, measure, pipeline_nulls, pipeline_values, prepare_sets, train

PIPELINE_NAME = "esvit-retrain"


def build_retrain_pipeline(
    config: Config, *, cluster: bool = False, owner: str = dsl.PIPELINE_JOB_ID_PLACEHOLDER
) -> Any:
    """Define the pipeline of one configuration.

    Args:
        config: its transfer sets and its section ``cluster`` shape the pipeline; as a whole it is the default of
            ``configuration``.
        cluster: place the steps on a cluster.
        owner: who makes the retraining, and may begin again; by default the run of KFP.

    Returns:
        The pipeline, a kfp ``GraphComponent``.

    Raises:
        UserError: for a cluster, and the cluster extra is not installed.
    """
    values, nulls = pipeline_values(config), pipeline_nulls(config)
    steps = Steps(config, cluster)

    @dsl.pipeline(name=PIPELINE_NAME, display_name="EsViT: retrain the champion on new pictures")
    def retrain_pipeline(  # type: ignore[no-untyped-def]
        data: str, settings: str = nulls, configuration: dict = values
    ):
        """Look for new pictures, go on from the champion with them, and promote what is better on the same pictures.

        Args:
            data: The pictures, old and new: s3://bucket/prefix, or a folder, tar or zip that the steps can reach.
            settings: What to change in the configuration, as after --set on the command line, with spaces between:
                retrain.min_new_images=500 promotion.margin=0.5. Which transfer sets there are cannot be changed here.
            configuration: The whole configuration, as `esvit recipe show` prints it. Its section retrain says when there
                is reason to retrain; the names of the transfer sets were fixed when this was compiled.
        """
        found = steps.add(
            find_new_data(source=data, configuration=configuration, owner=owner, settings=settings),
            "find new data",
            "prepare",
        )
        # kfp.local has no conditions: there the other steps run too, and find their work done.
        with dsl.If(found.outputs["nothing"] == False, "something-new") if cluster else nullcontext():  # noqa: E712
            _retrain(steps, found)

    return retrain_pipeline


def _retrain(steps: Steps, found: dsl.PipelineTask) -> None:
    run = found.outputs["run_uri"]
    prepared = steps.add(prepare_new_data(run_uri=run, found=found.outputs["found"]), "prepare new data", "prepare")
    sets = prepare_sets(steps, run)
    model = train(steps, run, prepared.outputs["dataset"], sets).outputs["model"]
    measured = measure(steps, run, prepared.outputs["dataset"], model, sets)
    results = [task.outputs["result"] for task in measured]
    compared = steps.add(compare_champion(run_uri=run, results=results), "compare with the champion", "evaluate")
    told = steps.add(report(run_uri=run, results=results), "report", "publish")
    told.after(compared)
    steps.add(promote(run_uri=run, model=model, report=told.outputs["html"]), "promote", "publish")
