"""The pipeline that runs again and again: from new images to a champion that has seen them, or not.

find new data -> prepare new data, prepare transfer sets -> pretrain -> as in pretrain -> compare -> report -> promote

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
from esvit_core.config.parameters import PLACE, cluster_text, parameters_of
from esvit_pipelines.steps import Steps, measure, prepare_sets, train

PIPELINE_NAME = "esvit-retrain"


def build_retrain_pipeline(
    config: Config, *, cluster: bool = False, owner: str = dsl.PIPELINE_JOB_ID_PLACEHOLDER
) -> Any:
    """Define the pipeline of one configuration.

    Args:
        config: the defaults of ``recipe``, ``settings`` and ``transfer``; its sections ``cluster`` and ``launch`` shape
            the pipeline, nothing else of it does.
        cluster: place the steps on a cluster.
        owner: who makes the retraining, and may begin again; by default the run of KFP.

    Returns:
        The pipeline, a kfp ``GraphComponent``.

    Raises:
        UserError: for a cluster, and the cluster extra is not installed.
    """
    steps, default = Steps(config, cluster), parameters_of(config, without=PLACE if cluster else ())
    place = cluster_text(config) if cluster else ""

    @dsl.pipeline(name=PIPELINE_NAME, display_name="EsViT: retrain the champion on new images")
    def retrain_pipeline(  # type: ignore[no-untyped-def]
        data: str,
        recipe: str = default.recipe,
        settings: str = default.settings,
        transfer: str = default.transfer,
    ):
        """Look for new images, go on from the champion with them, and promote what is better on the same images.

        Args:
            data: The images, old and new: s3://bucket/prefix, or a folder, tar or zip that the steps can reach.
            recipe: What to train: the name of a recipe, such as demo or imagenet_swin_tiny_w7 (`esvit recipe list`);
                the s3:// address of a YAML file; or YAML in one line, such as {model: {arch: swin_tiny_w7}}. Its
                section retrain says when there is reason to retrain.
            settings: Changes of the recipe, with commas between: retrain.min_new_images=500, promotion.margin=0.5. A
                setting can be null: promotion.max_loss=null. What the recipe says about all others holds, null included.
            transfer: Labelled sets to measure on besides, with commas between: digits=s3://my-bucket/digits. Empty means
                those of the recipe, as a rule none.
        """
        found = steps.add(
            find_new_data(source=data, recipe=recipe, owner=owner, settings=settings, transfer=transfer, cluster=place),
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
