from typing import NamedTuple

from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def linear_probe(
    run_uri: str,
    features: dsl.Input[dsl.Dataset],
    metrics: dsl.Output[dsl.Artifact],
    confusion: dsl.Output[dsl.ClassificationMetrics],
) -> NamedTuple("Outputs", [("result", str)]):
    """Train a linear classifier on the frozen features and measure it on the held-out images.

    Writes evaluation/linear.json of the run, and evaluation/few-shot.json if evaluation.few_shot names settings. For images without labels the result records that
    the evaluation was skipped, and why.

    Args:
        run_uri: The run, s3://bucket/runs/name.
        features: The feature files.

    Returns:
        metrics: Accuracy in percent, linear, and of the baseline.
        confusion: Confusion matrix of the trained network's probe, up to 100 classes.
        result: Address of the result in the object store.
    """
    from esvit_core.errors import step

    with step("linear probe"):
        from esvit_core.artifacts import evaluation_metrics, log_metrics, write_preview
        from esvit_core.runs.run import open_run

        run = open_run(run_uri)

        def measure():
            from esvit_core.evaluation.linear_probe import evaluate_linear

            evaluate_linear(run.uri, run.store, run.config)

        result = run.once("evaluation/linear.json", measure)
        log_metrics(metrics, evaluation_metrics(result))
        if run.config.evaluation.few_shot:

            def measure_few():
                from esvit_core.evaluation.few_shot import evaluate_few_shot

                evaluate_few_shot(run.uri, run.store, run.config)

            log_metrics(metrics, evaluation_metrics(run.once("evaluation/few-shot.json", measure_few)))
        # KFP keeps a confusion matrix among an artifact's metadata, which has to stay small.
        if result.get("confusion") and len(result["classes"]) <= 100:
            confusion.log_confusion_matrix(result["classes"], result["confusion"])
        write_preview(confusion)

    return (run.at("evaluation/linear.json"),)
