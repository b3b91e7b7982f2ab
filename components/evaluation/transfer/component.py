from typing import NamedTuple

from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def transfer(
    run_uri: str,
    sets: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    metrics: dsl.Output[dsl.Artifact],
) -> NamedTuple("Outputs", [("result", str)]):
    """Evaluate transfer to other labelled sets: logistic regression on frozen features.

    The strength of the L2 penalty is searched on held-out images, as in the paper. The sets of the run's configuration
    (evaluation.transfer) are evaluated in turn. The step writes evaluation/transfer-<set>.json of the run once per set,
    so a repeated step continues with the next set. If evaluation.segmentation names images with masks, it also writes
    evaluation/segmentation.json.

    Args:
        run_uri: The run, s3://bucket/runs/name.
        sets: The shards of the sets.
        model: The trained teacher.

    Returns:
        metrics: Accuracy in percent on each set, transfer/<set>, and of the baseline.
        result: Address of the folder of the results in the object store.
    """
    from esvit_core.errors import step

    with step("transfer"):
        from esvit_core.artifacts import evaluation_metrics, log_metrics
        from esvit_core.runs.run import open_run

        run = open_run(run_uri)
        names = [wanted.name for wanted in run.config.evaluation.transfer]
        for name in names:

            def measure(name=name):
                from esvit_core.evaluation.transfer import evaluate_transfer

                evaluate_transfer(run.uri, run.store, run.config, name)

            log_metrics(metrics, evaluation_metrics(run.once(f"evaluation/transfer-{name}.json", measure)))
        if run.config.evaluation.segmentation is not None:

            def segment():
                from esvit_core.evaluation.segmentation import evaluate_segmentation

                evaluate_segmentation(run.uri, run.store, run.config)

            log_metrics(metrics, evaluation_metrics(run.once("evaluation/segmentation.json", segment)))
        log_metrics(metrics, {})
        if not names:
            print("nothing to do: the run has no transfer sets", flush=True)

    return (run.at("evaluation"),)
