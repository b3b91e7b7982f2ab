from typing import NamedTuple

from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def compare_champion(
    run_uri: str,
    results: list[str],
    metrics: dsl.Output[dsl.Artifact],
) -> NamedTuple("Outputs", [("result", str)]):
    """Measure the current champion on the run's own images, to compare it with the challenger.

    The metrics recorded when the champion was promoted refer to the held-out images of that time and are not comparable.
    If the run started from the champion, the champion is the run's baseline and nothing is computed.

    Args:
        run_uri: The run, s3://bucket/runs/name.
        results: Addresses of the run's own results; the champion is evaluated with the same protocols.

    Returns:
        metrics: Metrics of the champion in percent.
        result: Address of the comparison in the object store; empty if there is nothing to compare.
    """
    from esvit_core.errors import step

    with step("compare with the champion"):
        from esvit_core.artifacts import log_metrics
        from esvit_core.registry.compare_champion import compare_with_current
        from esvit_core.runs.run import open_run

        address, figures, message = compare_with_current(open_run(run_uri))
        log_metrics(metrics, figures)
        print(message, flush=True)

    return (address,)
