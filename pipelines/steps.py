"""Steps that several pipelines share, and how a step is named and configured."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Any

from kfp import dsl

from esvit_components.data.prepare_transfer import prepare_transfer
from esvit_components.evaluation.extract_features import extract_features
from esvit_components.evaluation.knn import knn
from esvit_components.evaluation.linear_probe import linear_probe
from esvit_components.evaluation.transfer import transfer
from esvit_components.evaluation.visualize import visualize
from esvit_components.training.pretrain import pretrain
from esvit_core.config import Config
from esvit_core.config.cluster_settings import Role
from esvit_pipelines.cluster.step_pod import configure_pod


@dataclass
class Steps:
    """The steps of a pipeline while it is defined.

    Args:
        config: configuration of their pods.
        cluster: configure the pods for a cluster. Otherwise the steps are chained: kfp.local runs one at a time, but in
            an order that varies between runs.
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
        accelerated: bool = True,
        trains: bool = False,
    ) -> dsl.PipelineTask:
        """Set the display name, the image and the pod of a step.

        Args:
            role: kind of step, which selects the configuration of its pod.
            accelerated: the step can use the accelerators of its role.
            trains: it is the pre-training step, which trains in its own pod or starts a job.
        """
        task.set_display_name(name)
        task.set_container_image(self.config.cluster.image)
        # Every step finds its own outputs in the store. KFP's cache would never hit, since its key contains the ids of the
        # input artifacts, which are new in each run. And it would not notice changed data at the same address.
        task.set_caching_options(False)
        if self.cluster:
            configure_pod(task, self.config, role, accelerated, trains)
            return task
        task.after(*self._last)
        self._last = [task]
        return task


def prepare_images(
    steps: Steps, component: Callable[..., dsl.PipelineTask], name: str, **inputs: Any
) -> dsl.PipelineTask:
    """Add the step that prepares a run's images, after those that prepare a share of them each on a cluster.

    Args:
        component: prepare_data or prepare_new_data.
        name: name of the step.
        inputs: arguments of the component.
    """
    count = steps.config.cluster.prepare.parallelism if steps.cluster else 1
    shares = [
        steps.add(component(**inputs, share=f"{number}/{count}"), f"{name}, share {number} of {count}", "prepare")
        for number in range(1, count + 1)
        if count > 1
    ]
    prepared = steps.add(component(**inputs), name, "prepare")
    return prepared.after(*shares)


def prepare_sets(steps: Steps, run: Any) -> dsl.PipelineTask:
    """Add the step that prepares the run's transfer sets, with the output ``sets``.

    The run's configuration names the sets, so one compiled pipeline serves runs with any sets.
    """
    return steps.add(prepare_transfer(run_uri=run), "prepare transfer sets", "prepare")


def train(steps: Steps, run: Any, dataset: Any, sets: dsl.PipelineTask) -> dsl.PipelineTask:
    """Add the pre-training step, with the output ``model``.

    Args:
        run: address of the run, an output of a step.
        dataset: the prepared images.
        sets: the step of :func:`prepare_sets`.
    """
    trained = steps.add(pretrain(run_uri=run, dataset=dataset), "pretrain", "train", trains=True)
    # All data are prepared before the long step starts, so that invalid data fail early.
    return trained.after(sets)


def evaluate(steps: Steps, run: Any, dataset: Any, model: Any, sets: dsl.PipelineTask) -> list[dsl.PipelineTask]:
    """Add the steps that evaluate a run's backbone; each has the output ``result``.

    Args:
        run: address of the run, an output of a step.
        dataset: the prepared images.
        model: the backbone.
        sets: the step of :func:`prepare_sets`.
    """
    features = steps.add(extract_features(run_uri=run, dataset=dataset, model=model), "extract features", "evaluate")
    feature_files = features.outputs["features"]
    return [
        steps.add(knn(run_uri=run, features=feature_files), "k-NN", "evaluate", accelerated=False),
        steps.add(linear_probe(run_uri=run, features=feature_files), "linear probe", "evaluate"),
        steps.add(transfer(run_uri=run, sets=sets.outputs["sets"], model=model), "transfer", "evaluate"),
        steps.add(visualize(run_uri=run, dataset=dataset, model=model), "visualize", "evaluate"),
    ]


def step_names(pipeline: Any) -> list[str]:
    """List the names of the pipeline's steps in topological order, including those below a condition."""
    spec = pipeline.pipeline_spec  # of a loaded pipeline, parsed at each access
    return list(_names(spec, spec.root.dag))


def _names(spec: Any, dag: Any) -> Iterator[str]:
    tasks = dag.tasks
    waiting = {key: set(task.dependent_tasks) for key, task in sorted(tasks.items())}
    for key in TopologicalSorter(waiting).static_order():
        component = spec.components[tasks[key].component_ref.name]
        if component.HasField("dag"):
            yield from _names(spec, component.dag)
        else:
            yield tasks[key].task_info.name
