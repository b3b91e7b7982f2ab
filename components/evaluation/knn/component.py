from typing import NamedTuple

from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def knn(
    run_uri: str,
    features: dsl.Input[dsl.Dataset],
    metrics: dsl.Output[dsl.Artifact],
) -> NamedTuple("Outputs", [("result", str)]):
    """Classify the held-out images by their nearest neighbours among the features (weighted k-NN).

    Writes evaluation/knn.json of the run, and evaluation/retrieval.json if evaluation.retrieval is set. For images without labels the result records that
    the evaluation was skipped, and why.

    Args:
        run_uri: The run, s3://bucket/runs/name.
        features: The feature files.

    Returns:
        metrics: Accuracy in percent for each k, knn/<k>, and of the baseline.
        result: Address of the result in the object store.
    """
    from esvit_core.errors import step

    with step("k-NN"):
        from esvit_core.artifacts import evaluation_metrics, log_metrics
        from esvit_core.runs.run import open_run

        run = open_run(run_uri)

        def measure():
            from esvit_core.evaluation.knn import evaluate_knn

            evaluate_knn(run.uri, run.store, run.config)

        log_metrics(metrics, evaluation_metrics(run.once("evaluation/knn.json", measure)))
        if run.config.evaluation.retrieval:

            def retrieve():
                from esvit_core.evaluation.retrieval import evaluate_retrieval

                evaluate_retrieval(run.uri, run.store, run.config)

            log_metrics(metrics, evaluation_metrics(run.once("evaluation/retrieval.json", retrieve)))

    return (run.at("evaluation/knn.json"),)
