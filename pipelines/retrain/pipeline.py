"""The pipeline for recurring runs: retrain the champion on new images, and promote the result if it is better.

find new data -> prepare new data, prepare transfer sets -> pretrain -> as in pretrain -> compare -> report -> promote

On a cluster only the first step runs if there are too few new images.
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
from esvit_core.config.parameters import COMPILED_SECTIONS, compiled_sections_yaml, to_parameters
from esvit_pipelines.steps import Steps, evaluate, prepare_images, prepare_sets, train

PIPELINE_NAME = "esvit-retrain"


def build_retrain_pipeline(
    config: Config, *, cluster: bool = False, owner: str = dsl.PIPELINE_JOB_ID_PLACEHOLDER
) -> Any:
    """Build the pipeline for a configuration.

    Args:
        config: defaults of ``recipe``, ``settings`` and ``transfer``; only its sections ``cluster`` and ``launch`` affect
            the compiled pipeline otherwise.
        cluster: configure the pods of the steps for a cluster.
        owner: owner of the retraining's lease, who may resume it; by default the KFP run.

    Returns:
        The pipeline, a kfp ``GraphComponent``.

    Raises:
        UserError: ``cluster`` is true and the cluster extra is not installed.
    """
    steps, default = Steps(config, cluster), to_parameters(config, without=COMPILED_SECTIONS if cluster else ())
    overrides = compiled_sections_yaml(config) if cluster else ""

    @dsl.pipeline(name=PIPELINE_NAME, display_name="EsViT: retrain the champion on new images")
    def retrain_pipeline(  # type: ignore[no-untyped-def]
        data: str,
        recipe: str = default.recipe,
        settings: str = default.settings,
        transfer: str = default.transfer,
    ):
        """Look for new images, continue training the champion on them, and promote the result if it is better.

        Args:
            data: Old and new images: s3://bucket/prefix, or a folder, tar or zip that the steps can read.
            recipe: Training settings: the name of a recipe, such as demo or imagenet_swin_tiny_w7 (`esvit recipe list`);
                the s3:// address of a YAML file; or YAML in one line, such as {model: {arch: swin_tiny_w7}}. Its
                section retrain sets when to retrain.
            settings: Overrides of the recipe, separated by commas: retrain.min_new_images=500, promotion.margin=0.5. A
                setting can be null: promotion.max_loss=null. All other settings are those of the recipe, including nulls.
            transfer: Additional labelled sets to evaluate on, separated by commas: digits=s3://my-bucket/digits. Empty
                means those of the recipe, usually none.
        """
        new_data = steps.add(
            find_new_data(
                source=data, recipe=recipe, owner=owner, settings=settings, transfer=transfer, cluster=overrides
            ),
            "find new data",
            "prepare",
        )
        # kfp.local does not support conditions: there the other steps run too, and find their outputs.
        with dsl.If(new_data.outputs["nothing"] == False, "new-images") if cluster else nullcontext():  # noqa: E712
            _retrain(steps, new_data)

    return retrain_pipeline


def _retrain(steps: Steps, new_data: dsl.PipelineTask) -> None:
    run = new_data.outputs["run_uri"]
    found = new_data.outputs["found"]
    prepared = prepare_images(steps, prepare_new_data, "prepare new data", run_uri=run, found=found)
    sets = prepare_sets(steps, run)
    model = train(steps, run, prepared.outputs["dataset"], sets).outputs["model"]
    evaluations = evaluate(steps, run, prepared.outputs["dataset"], model, sets)
    results = [task.outputs["result"] for task in evaluations]
    compared = steps.add(compare_champion(run_uri=run, results=results), "compare with the champion", "evaluate")
    written = steps.add(report(run_uri=run, results=results), "report", "publish")
    written.after(compared)
    steps.add(promote(run_uri=run, model=model, report=written.outputs["html"]), "promote", "publish")
