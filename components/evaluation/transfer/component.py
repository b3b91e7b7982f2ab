from typing import NamedTuple

from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def transfer(
    run_uri: str,
    set_name: str,
    dataset: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("Outputs", [("result", str)]):
    """Measure how well the features carry over to another labelled set: logistic regression on frozen features.

    The strength of the L2 penalty is searched on held-out pictures, as in the paper. Writes
    evaluation/transfer-<set>.json of the run.

    Args:
        run_uri: The run, s3://bucket/runs/name.
        set_name: Name of the set in the configuration's evaluation.transfer.
        dataset: The shards of the set.
        model: The trained teacher.

    Returns:
        metrics: Accuracy in percent, trained and untrained.
        result: Address of the result in the object store.
    """
    from esvit_core.errors import step

    with step(f"transfer {set_name}"):
        from esvit_core.artifacts import figures, log_metrics
        from esvit_core.runs import open_run

        run = open_run(run_uri)
        name = f"evaluation/transfer-{set_name}.json"

        def measure():
            from esvit_core.evaluation.transfer import evaluate_transfer

            evaluate_transfer(run.uri, run.store, run.config, set_name)

        log_metrics(metrics, figures(run.once(name, measure)))

    return (run.at(name),)
