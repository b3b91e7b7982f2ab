from typing import NamedTuple

from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def promote(
    run_uri: str,
    model: dsl.Input[dsl.Model],
    report: dsl.Input[dsl.HTML],
    decision: dsl.Output[dsl.Artifact],
) -> NamedTuple("Outputs", [("promoted", bool), ("reason", str)]):
    """Make the backbone the champion if it beats the current champion by the rule of the recipe (promotion.rule).

    The champion is a pointer in the object store, which is changed by a conditional put: of two concurrent runs one wins,
    and the other is compared with the winner. Writes promotion.json of the run with the decision. If the recipe sets
    registry.kind to kubeflow, the champion is also registered as a version in the Kubeflow Model Registry.

    Args:
        run_uri: Address of the run, s3://bucket/runs/name.
        model: The backbone of the trained teacher.
        report: The report of the run, which has to exist before the promotion.

    Returns:
        decision: The decision, and the metric and value that it is based on.
        promoted: Whether the backbone is now the champion.
        reason: The reason in one sentence.
    """
    from esvit_core.errors import step

    with step("promote"):
        from esvit_core.artifacts import point_to
        from esvit_core.registry.kubeflow_registry import register_after_promotion
        from esvit_core.runs.run import open_run

        run = open_run(run_uri)

        def decide():
            from esvit_core.registry.promotion import promote

            promote(run.uri, run.store, run.config)

        decided = run.once("promotion.json", decide)
        point_to(
            decision,
            run.at("promotion.json"),
            **{key: decided[key] for key in ("promoted", "reason", "metric", "value")},
        )
        print(decided["reason"], flush=True)
        if decided["promoted"] and (message := register_after_promotion(run)):
            print(message, flush=True)

    return (decided["promoted"], decided["reason"])
