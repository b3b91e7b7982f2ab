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
    """Make the backbone the champion if it beats the present one on the chosen metric by the margin.

    The champion is a pointer in the object store, changed by conditional put: of two runs at once one wins, and the
    other compares itself with the winner. Writes promotion.json of the run, whichever way it went. Where the recipe says
    registry.kind: kubeflow, the champion becomes a version in the Kubeflow Model Registry.

    Args:
        run_uri: The run, s3://bucket/runs/name.
        model: The trained teacher.
        report: The report, which a person can read before the backbone is used.

    Returns:
        decision: What was decided, and on which figures.
        promoted: Whether the backbone is the champion now.
        reason: Why, in a sentence.
    """
    from esvit_core.errors import step

    with step("promote"):
        from esvit_core.artifacts import point_to
        from esvit_core.registry.kubeflow_registry import announce
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
        if decided["promoted"] and (told := announce(run)):
            print(told, flush=True)

    return (decided["promoted"], decided["reason"])
