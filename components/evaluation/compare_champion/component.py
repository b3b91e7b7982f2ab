from typing import NamedTuple

from kfp import dsl

from esvit_components.image import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False)
def compare_champion(
    run_uri: str,
    results: list[str],
    metrics: dsl.Output[dsl.Artifact],
) -> NamedTuple("Outputs", [("result", str)]):
    """Measure the present champion on the run's own images, so that it and its challenger compare.

    The figures with which a champion was promoted are of the held-out images of then. Where the run started from
    the champion they are the run's baseline, and nothing is computed.

    Args:
        run_uri: The run, s3://bucket/runs/name.
        results: Addresses of the run's own results; the champion is measured with the same evaluations.

    Returns:
        metrics: The champion's figures in percent.
        result: Address of the comparison in the object store; empty where there is nothing to compare.
    """
    from esvit_core.errors import step

    with step("compare with the champion"):
        from esvit_core.artifacts import log_metrics
        from esvit_core.registry.compare_champion import compare_with_current
        from esvit_core.runs.run import open_run

        address, figures, told = compare_with_current(open_run(run_uri))
        log_metrics(metrics, figures)
        print(told, flush=True)

    return (address,)
