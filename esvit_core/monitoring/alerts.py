"""The alert rules for Prometheus, generated with adjustable durations so that a test can run them in seconds.

``python -m esvit_core.monitoring.alerts > manifests/monitoring/alerts.yaml`` writes the rule file; with ``--kubernetes``
it writes a ``PrometheusRule`` for ``prometheusrule.yaml``. Tests check that both files are current. docs/operate.md
explains every alert and what to do.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import yaml

from esvit_core.config import DiagnosticsConfig

RUNBOOK = "docs/operate.md"
BY_RUN = "by (run, recipe)"
SLOW_FACTOR = 1.5  # step time compared with the run's own past
STARVED_SHARE = 0.25  # share of the step time spent waiting for data
CHECKPOINT_INTERVALS = 3
RESTARTS = 3
STORE_ERRORS = 10
STORE_FREE_SHARE = 0.1  # of the volume
STORE_DAYS_AHEAD = 3


@dataclass(frozen=True)
class Durations:
    """The durations in the rules, seconds.

    Attributes:
        recent: window of current rates; about 40 scrapes.
        past: window with which the current rates are compared.
        lasting: time for which a condition must hold, for conditions that are harmless for a moment.
        collapse: the same for a collapse, which the run itself ends after ``training.collapse_patience`` steps.
        restart: time that a restart of a run may take.
        remembered: time for which a run that disappeared is reported.
        remaining: least work left for a disappeared run to be reported.
    """

    recent: float = 600
    past: float = 6 * 3600
    lasting: float = 300
    collapse: float = 60
    restart: float = 300
    remembered: float = 1800
    remaining: float = 120

    def scaled(self, factor: float) -> Durations:
        """Scale all durations by ``factor``, for another scrape interval."""
        return Durations(**{name: value * factor for name, value in vars(self).items()})


@dataclass(frozen=True)
class _Alert:
    """One rule: expression, duration, severity and summary."""

    name: str
    expression: str
    lasting: float
    severity: str
    summary: str
    labels: tuple[tuple[str, str], ...] = ()


def alert_rules(durations: Durations | None = None) -> dict[str, Any]:
    """Return the rule file as a mapping.

    Args:
        durations: default: those for a scrape interval of 15 s.
    """
    at = durations or Durations()
    return {
        "groups": [
            {
                "name": "esvit",
                "rules": [_rule(alert) for alert in (*_pace(at), *_result(at), *_safety(at), *_store(at))],
            }
        ]
    }


def _pace(at: Durations) -> list[_Alert]:
    recent, past = _text(at.recent), _text(at.past)
    steps, seconds = "esvit_train_step_seconds_count", "esvit_train_step_seconds_sum"
    now = f"sum {BY_RUN} (rate({seconds}[{recent}])) / sum {BY_RUN} (rate({steps}[{recent}]))"
    before = now.replace(f"[{recent}]", f"[{past}] offset {recent}")
    known = f"sum {BY_RUN} (increase({steps}[{past}] offset {recent})) > 50"
    left = " - ".join(
        f"max {BY_RUN} (last_over_time({name}[{_text(at.remembered)}]))"
        for name in ("esvit_train_steps_planned", "esvit_train_step")
    )
    mean = f"last_over_time({seconds}[{_text(at.remembered)}]) / last_over_time({steps}[{_text(at.remembered)}])"
    return [
        _Alert(
            "EsvitTrainStalled",
            f"sum {BY_RUN} (increase({steps}[{recent}])) == 0",
            0,
            "critical",
            f"{{{{ $labels.run }}}} has made no step for {recent}",
        ),
        _Alert(
            "EsvitTrainGone",
            f"({left}) * max {BY_RUN} ({mean}) > {at.remaining:g} unless max {BY_RUN} (esvit_train_step)",
            at.restart,
            "critical",
            "{{ $labels.run }} has gone with {{ $value | humanizeDuration }} of work left",
        ),
        _Alert(
            "EsvitTrainSlow",
            f"({now}) > {SLOW_FACTOR:g} * ({before}) and {known}",
            at.lasting,
            "warning",
            f"{{{{ $labels.run }}}} takes {{{{ $value | humanizeDuration }}}} a step, {SLOW_FACTOR:g} times its past or more",
        ),
        _Alert(
            "EsvitTrainDataStarved",
            f"sum {BY_RUN} (rate(esvit_train_data_wait_seconds_total[{recent}]))"
            f" / sum {BY_RUN} (rate({seconds}[{recent}])) > {STARVED_SHARE:g}",
            at.lasting,
            "warning",
            "{{ $labels.run }} waits for data {{ $value | humanizePercentage }} of the time",
        ),
    ]


def _result(at: Durations) -> list[_Alert]:
    recent, total = _text(at.recent), 'esvit_train_loss{term="total"}'
    bounds = DiagnosticsConfig()  # the defaults apply even to a run with its own bounds
    signs = {
        "one_prototype": f'esvit_teacher_entropy_nats{{level="view"}} < {bounds.entropy_stop:g}',
        "uniform": f'esvit_teacher_kl_nats{{level="view"}} < {bounds.kl_stop:g} and on (run, recipe) '
        f'esvit_teacher_entropy_nats{{level="view"}} >= {bounds.entropy_stop:g}',
        "constant_feature": f"esvit_teacher_feature_std < {bounds.feature_std_stop:g}",
    }
    return [
        _Alert(
            "EsvitLossNotFinite",
            f"sum {BY_RUN} (increase(esvit_train_nonfinite_steps_total[{recent}])) > 0"
            f" or max {BY_RUN} ({total} unless abs({total}) < Inf)",
            0,
            "critical",
            "{{ $labels.run }} has had a loss or a gradient that is not finite",
        ),
        *(
            _Alert(
                "EsvitTeacherCollapse",
                f"max {BY_RUN} ({expression})",
                at.collapse,
                "critical",
                f"{{{{ $labels.run }}}}: the teacher collapses ({sign.replace('_', ' ')})",
                (("sign", sign),),
            )
            for sign, expression in signs.items()
        ),
    ]


def _safety(at: Durations) -> list[_Alert]:
    recent, hour = _text(at.recent), _text(6 * at.recent)
    restarts = "esvit_train_restarts_total"
    return [
        _Alert(
            "EsvitCheckpointTooOld",
            f"max {BY_RUN} (esvit_checkpoint_age_seconds) > {CHECKPOINT_INTERVALS}"
            f" * max {BY_RUN} (esvit_checkpoint_interval_seconds)",
            0,
            "critical",
            "{{ $labels.run }}: the last checkpoint is {{ $value | humanizeDuration }} old",
        ),
        _Alert(
            # Not increase(): every start is a new process, whose counter starts at the number of restarts.
            "EsvitTrainRestarting",
            f"max {BY_RUN} (max_over_time({restarts}[{hour}])) - min {BY_RUN} (min_over_time({restarts}[{hour}]))"
            f" >= {RESTARTS}",
            0,
            "warning",
            f"{{{{ $labels.run }}}} was started again {{{{ $value }}}} times within {hour}",
        ),
        _Alert(
            "EsvitStoreErrors",
            f"sum {BY_RUN} (increase(esvit_store_errors_total[{recent}])) > {STORE_ERRORS}",
            0,
            "warning",
            f"{{{{ $labels.run }}}}: {{{{ $value | humanize }}}} requests to the object store failed within {recent}",
        ),
    ]


def _store(at: Durations) -> list[_Alert]:
    """Return the alerts on free space of the store in the cluster, from SeaweedFS's metrics, if there is one.

    ``avail`` is what the server still accepts: the free space less ``-volume.minFreeSpace``.
    """
    room = 'SeaweedFS_volumeServer_resource{type="avail"}'
    size = 'ignoring (type) SeaweedFS_volumeServer_resource{type="all"}'
    ahead = STORE_DAYS_AHEAD * 86400
    past, hour = _text(at.past), 6 * at.recent
    left = f"predict_linear({room}[{past}], {ahead})"
    return [
        _Alert(
            "EsvitStoreLowSpace",
            f"{room} / {size} < {STORE_FREE_SHARE:g}",
            at.lasting,
            "critical",
            "the object store at {{ $labels.instance }} has {{ $value | humanizePercentage }} of its volume left",
        ),
        _Alert(
            "EsvitStoreFillingUp",
            f"{left} < 0",
            hour,
            "warning",
            f"the object store at {{{{ $labels.instance }}}} is full within {STORE_DAYS_AHEAD} days at the pace of {past}",
        ),
    ]


def _rule(alert: _Alert) -> dict[str, Any]:
    rule: dict[str, Any] = {"alert": alert.name, "expr": alert.expression}
    if alert.lasting:
        rule["for"] = _text(alert.lasting)
    rule["labels"] = {"severity": alert.severity, **dict(alert.labels)}
    rule["annotations"] = {"summary": alert.summary, "runbook": f"{RUNBOOK}#{alert.name.lower()}"}
    return rule


def _text(seconds: float) -> str:
    """Format a duration as Prometheus does."""
    for unit, size in (("h", 3600), ("m", 60), ("s", 1)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:.0f}{unit}"
    return f"{1000 * seconds:.0f}ms"


def rule_file(rules: dict[str, Any]) -> str:
    """Return the rules as YAML."""
    return yaml.safe_dump(rules, sort_keys=False, width=120)


def prometheus_rule(rules: dict[str, Any]) -> dict[str, Any]:
    """Return the rules as an object of the Prometheus operator."""
    metadata = {"name": "esvit", "labels": {"app.kubernetes.io/name": "esvit"}}
    return {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule", "metadata": metadata, "spec": rules}


if __name__ == "__main__":
    kubernetes = sys.argv[1:] == ["--kubernetes"]
    called = "python -m esvit_core.monitoring.alerts" + (" --kubernetes" if kubernetes else "")
    sys.stdout.write(f"# Made by `{called}`; {RUNBOOK} says what to do.\n")
    sys.stdout.write(rule_file(prometheus_rule(alert_rules()) if kubernetes else alert_rules()))
