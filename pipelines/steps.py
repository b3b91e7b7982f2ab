"""What the pipelines have in common: how a step is named and placed, and the steps that more than one of them has."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Any

from kfp import dsl

from esvit_components.data.prepare_transfer import prepare_transfer
from esvit_components.evaluation.extract_features import extract_features
from esvit_components.evaluation.knn import knn
from esvit_components.evaluation.linear_probe import linear_probe
from esvit_components.evaluation.pictures import pictures
from esvit_components.evaluation.transfer import transfer
from esvit_components.training.pretrain import pretrain
from esvit_core.config import Config
from esvit_core.config.cluster import Role
from esvit_pipelines.pods import place


@dataclass
class Steps:
    """The steps of a pipeline while it is defined.

    Args:
        config: says what their pods get.
        cluster: place them on a cluster. Otherwise they are put in a row: kfp.local runs one at a time, but in an
            order that changes from run to run.
    """

    config: Config
    cluster: bool
    _last: list[dsl.PipelineTask] = field(default_factory=list)

    def add(
        self,
        task: dsl.PipelineTask,
        name: str,
        role: Role,
        *,
        cached: bool = False,
        accelerated: bool = True,
        serves_metrics: bool = False,
    ) -> dsl.PipelineTask:
        """Name a step for the UI and say where it runs.

        Args:
            role: kind of step, which decides what its pod gets.
            cached: KFP may take the outputs of an earlier run; right only for what the arguments alone determine.
            accelerated: it can use the accelerators of its kind of step.
            serves_metrics: it trains in its own pod.
        """
        task.set_display_name(name)
        task.set_container_image(self.config.cluster.image)
        task.set_caching_options(cached)
        if self.cluster:
            place(task, self.config.cluster, role, accelerated, serves_metrics)
            return task
        task.after(*self._last)
        self._last = [task]
        return task


def prepare_sets(steps: Steps, run: Any) -> dict[str, dsl.PipelineTask]:
    """A step for each transfer set of the configuration, by its name.

    They are fanned out at definition time: the UI shows a node for each, and kfp.local can run it (it has neither
    conditions nor a collection of a loop's outputs).
    """
    return {
        s.name: steps.add(prepare_transfer(run_uri=run, set_name=s.name), f"prepare {s.name}", "prepare")
        for s in steps.config.evaluation.transfer
    }


def train(steps: Steps, run: Any, dataset: Any, sets: Mapping[str, dsl.PipelineTask]) -> dsl.PipelineTask:
    """The step that pre-trains, with the output ``model``.

    Args:
        run: address of the run, an output of a step.
        dataset: the prepared pictures.
        sets: of :func:`prepare_sets`.
    """
    here = steps.config.launch.scheduler == "local"  # else the step waits for other pods, which train
    trained = steps.add(
        pretrain(run_uri=run, dataset=dataset), "pretrain", "train", accelerated=here, serves_metrics=here
    )
    # All data are looked at before the long step begins: what is wrong with them shows at once.
    return trained.after(*sets.values())


def measure(
    steps: Steps, run: Any, dataset: Any, model: Any, sets: Mapping[str, dsl.PipelineTask]
) -> list[dsl.PipelineTask]:
    """The steps that measure a run's backbone; each has the output ``result``.

    Args:
        run: address of the run, an output of a step.
        dataset: the prepared pictures.
        model: the backbone.
        sets: of :func:`prepare_sets`.
    """
    features = steps.add(
        extract_features(run_uri=run, dataset=dataset, model=model), "extract features", "evaluate", cached=True
    )
    vectors = features.outputs["features"]
    return [
        steps.add(knn(run_uri=run, features=vectors), "k-NN", "evaluate", cached=True, accelerated=False),
        steps.add(linear_probe(run_uri=run, features=vectors), "linear probe", "evaluate", cached=True),
        *(
            steps.add(
                transfer(run_uri=run, set_name=name, dataset=prepared.outputs["dataset"], model=model),
                f"transfer {name}",
                "evaluate",
                cached=True,
            )
            for name, prepared in sets.items()
        ),
        steps.add(pictures(run_uri=run, dataset=dataset, model=model), "pictures", "evaluate", cached=True),
    ]


def step_names(pipeline: Any) -> list[str]:
    """Names of the pipeline's steps, each after those that it waits for; those below a condition too."""
    return list(_names(pipeline.pipeline_spec, pipeline.pipeline_spec.root.dag))


def _names(spec: Any, dag: Any) -> Iterator[str]:
    tasks = dag.tasks
    waiting = {key: set(task.dependent_tasks) for key, task in sorted(tasks.items())}
    for key in TopologicalSorter(waiting).static_order():
        component = spec.components[tasks[key].component_ref.name]
        if component.HasField("dag"):
            yield from _names(spec, component.dag)
        else:
            yield tasks[key].task_info.name


def pipeline_values(config: Config) -> dict[str, Any]:
    """The configuration as an argument of a pipeline. KFP has no null: what is not set is not in it."""
    return config.model_dump(mode="json", exclude_none=True)


def pipeline_nulls(config: Config) -> str:
    """What :func:`pipeline_values` cannot say, as the argument ``settings``: null where the default is a value."""
    wanted = config.model_dump(mode="json")
    said = Config.from_mapping(pipeline_values(config)).model_dump(mode="json")

    def nulls(wanted: Mapping[str, Any], said: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for name, value in wanted.items():
            if isinstance(value, dict) and isinstance(said[name], dict):
                yield from nulls(value, said[name], f"{prefix}{name}.")
            elif value is None and said[name] is not None:
                yield f"{prefix}{name}=null"

    return " ".join(nulls(wanted, said, ""))
