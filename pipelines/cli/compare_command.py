"""`esvit compare`: print the figures of finished runs side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence

from esvit_core.errors import UserError
from esvit_core.evaluation.side_by_side import compare_subjects, read_subject
from esvit_core.runs.run import open_run, run_uri
from esvit_pipelines.cli.status_commands import RunLocation
from esvit_pipelines.local.evaluate import print_comparison


def compare(location: RunLocation, names: Sequence[str], references: Sequence[str], as_json: bool) -> None:
    """Print the figures of finished runs side by side, and write the comparison to a page.

    Args:
        location: store of the runs.
        names: names of runs, or prefixes of them.
        references: runs that the others are compared with; none: the first of ``names``.
        as_json: print JSON, and write nothing.

    Raises:
        UserError: there is no such run, a run has no results, or fewer than two are named.
    """
    with location.open() as store:
        found = [location.find(store, name) for name in [*names, *references]]
        distinct = list(dict.fromkeys(found))
        if len(distinct) < 2:
            raise UserError(f"run {distinct[0]}: it cannot be compared with itself; name at least two runs")
        chosen = list(dict.fromkeys(found[len(names) :])) or distinct[:1]
        if set(chosen) == set(distinct):
            raise UserError("--baseline: all runs are baselines; name another run to compare with them")
        runs = [open_run(run_uri(location.bucket, name), store) for name in distinct]
        subjects = [read_subject(store, run.uri, run.config, run.name) for run in runs]
        comparison = compare_subjects(subjects, chosen)
    if as_json:
        print(json.dumps(comparison.as_json(), indent=1))
    else:
        print_comparison(comparison, location.out)
