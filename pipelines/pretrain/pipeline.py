"""The pipeline: from pictures to a measured, published backbone.

prepare data, prepare <set> ... -> pretrain -> extract features -> k-NN        -> report -> promote
                                                                -> linear probe ->
                                            -> transfer <set> ...              ->
                                            -> pictures                        ->

The same function runs on one machine (`esvit run`, through kfp.local) and is compiled for a cluster (`esvit compile`).
"""

from graphlib import TopologicalSorter
from typing import Any

from kfp import dsl

from esvit_components.data.prepare_data import prepare_data
from esvit_components.data.prepare_transfer import prepare_transfer
from esvit_components.deployment.promote import promote
from esvit_components.evaluation.extract_features import extract_features
from esvit_components.evaluation.knn import knn
from esvit_components.evaluation.linear_probe import linear_probe
from esvit_components.evaluation.pictures import pictures
from esvit_components.evaluation.transfer import transfer
from esvit_components.reporting.report import report
from esvit_components.training.pretrain import pretrain
from esvit_core.config import Config
from esvit_core.errors import UserError

PIPELINE_NAME = "esvit-pretrain"
_REQUIRED_KEYS = ("ESVIT_S3_ENDPOINT", "ESVIT_S3_ACCESS_KEY", "ESVIT_S3_SECRET_KEY")
_OPTIONAL_KEYS = ("ESVIT_S3_SECURE", "ESVIT_S3_REGION")


def build_pretrain_pipeline(config: Config, *, cluster: bool = False) -> Any:
    """Define the pipeline of one configuration.

    The transfer sets are fanned out here, at definition time: the UI shows a node for each, and kfp.local can run it
    (it has neither conditions nor a collection of a loop's outputs).

    Args:
        config: its transfer sets and image shape the pipeline; as a whole it is the default of ``configuration``.
        cluster: take the object store's keys from the Kubernetes secret that the configuration names. Otherwise the
            steps are put in a row: kfp.local runs one at a time, but in an order that changes from run to run.

    Returns:
        The pipeline, a kfp ``GraphComponent``: call it to run it locally, or compile it.
    """
    values = pipeline_values(config)
    row: list[dsl.PipelineTask] = []

    def named(task: dsl.PipelineTask, name: str, cached: bool = False) -> dsl.PipelineTask:
        """A name for the UI, the image, the keys. Cached is only what its arguments alone determine."""
        task.set_display_name(name)
        task.set_container_image(config.cluster.image)
        task.set_caching_options(cached)
        if cluster:
            return _with_keys(task, config.cluster.secret)
        task.after(*row[-1:])
        row.append(task)
        return task

    @dsl.pipeline(name=PIPELINE_NAME, display_name="EsViT: pre-train, measure, publish")
    def pretrain_pipeline(data: str, configuration: dict = values, run_uri: str = ""):  # type: ignore[no-untyped-def]
        """Pre-train a vision backbone on unlabelled pictures (EsViT), measure it, report it, and publish it.

        Args:
            data: The pictures: s3://bucket/prefix, or a folder, tar or zip that the steps can reach.
            configuration: The whole configuration of the run, as `esvit recipe show` prints it; what is not in it has
                its default. The names of the transfer sets were fixed when this was compiled.
            run_uri: Where the run lies in the object store, s3://bucket/runs/name; empty means the place that
                configuration and data determine, so that the same run is found again and continued.
        """
        prepared = named(prepare_data(source=data, configuration=configuration, run_uri=run_uri), "prepare data")
        run = prepared.outputs["run_uri"]
        sets = {
            s.name: named(prepare_transfer(run_uri=run, set_name=s.name), f"prepare {s.name}")
            for s in config.evaluation.transfer
        }
        trained = named(pretrain(run_uri=run, dataset=prepared.outputs["dataset"]), "pretrain")
        # All data are looked at before the long step begins: what is wrong with them shows at once.
        trained.after(*sets.values())

        dataset, model = prepared.outputs["dataset"], trained.outputs["model"]
        features = named(extract_features(run_uri=run, dataset=dataset, model=model), "extract features", cached=True)
        vectors = features.outputs["features"]
        measured = [
            named(knn(run_uri=run, features=vectors), "k-NN", cached=True),
            named(linear_probe(run_uri=run, features=vectors), "linear probe", cached=True),
            *(
                named(
                    transfer(run_uri=run, set_name=name, dataset=prepared_set.outputs["dataset"], model=model),
                    f"transfer {name}",
                    cached=True,
                )
                for name, prepared_set in sets.items()
            ),
            named(pictures(run_uri=run, dataset=dataset, model=model), "pictures", cached=True),
        ]
        told = named(report(run_uri=run, results=[task.outputs["result"] for task in measured]), "report")
        named(promote(run_uri=run, model=model, report=told.outputs["html"]), "promote")

    return pretrain_pipeline


def step_names(pipeline: Any) -> list[str]:
    """Names of the pipeline's steps, each after those that it waits for."""
    tasks = pipeline.pipeline_spec.root.dag.tasks
    waiting = {key: set(task.dependent_tasks) for key, task in sorted(tasks.items())}
    return [tasks[key].task_info.name for key in TopologicalSorter(waiting).static_order()]


def pipeline_values(config: Config) -> dict[str, Any]:
    """The configuration as an argument of the pipeline. KFP has no null: what is not set is not in it."""
    return config.model_dump(mode="json", exclude_none=True)


def _with_keys(task: dsl.PipelineTask, secret: str) -> dsl.PipelineTask:
    """Keys of the object store as environment, from a Kubernetes secret: none of them is in the pipeline."""
    try:
        from kfp import kubernetes
    except ImportError:
        raise UserError(
            "a pipeline for a cluster: kfp-kubernetes is not installed; pip install 'esvit[cluster]'"
        ) from None
    kubernetes.use_secret_as_env(task, secret, {key: key for key in _REQUIRED_KEYS})
    # A secret that lacks one of these is no error: they have defaults.
    kubernetes.use_secret_as_env(task, secret, {key: key for key in _OPTIONAL_KEYS}, optional=True)
    return task
