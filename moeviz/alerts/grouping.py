"""Alerts for readers: the latest state of every episode, and many layers with one complaint as one line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moeviz.alerts.rules import SEVERITIES, rule
from moeviz.colors import SEVERITY_MARKS
from moeviz.records import AlertRecord, Severity


@dataclass(frozen=True, kw_only=True)
class AlertGroup:
    """Open alerts of one rule that are told as one: those of a single layer, or of most layers of the run."""

    rule: str
    severity: Severity
    """The gravest among them."""
    first_step: int
    message: str
    remedy: str
    alerts: tuple[AlertRecord, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers concerned, ascending; empty for a run-level alert."""
        return tuple(sorted(alert.layer for alert in self.alerts if alert.layer is not None))


def latest(alerts: Iterable[AlertRecord]) -> tuple[AlertRecord, ...]:
    """Latest record of each episode: open ones first, worst first, then cleared ones.

    Newest first within each.

    Records are taken in the order given; a later one of the same episode replaces an earlier one.
    """
    states = {alert.episode: alert for alert in alerts}

    def place(alert: AlertRecord) -> tuple[bool, int, int]:
        if alert.cleared_step is not None:
            return True, 0, -alert.cleared_step
        return False, -SEVERITIES.index(alert.severity), -alert.raised_step

    return tuple(sorted(states.values(), key=place))


def alert_line(alert: AlertRecord) -> str:
    """One transition of an alert as a line: what happened where."""
    where = "" if alert.layer is None else f" layer {alert.layer}"
    if alert.cleared_step is not None:
        return f"step {alert.updated_step}  cleared: {alert.rule}{where}"
    mark = SEVERITY_MARKS[alert.severity]
    return f"step {alert.updated_step}  {mark} {alert.severity}: {alert.rule}{where}: {alert.message}"


def grouped(alerts: Iterable[AlertRecord], num_layers: int) -> tuple[AlertGroup, ...]:
    """Open alerts as lines to read, worst first.

    A rule that is open in more than half of the layers is one line.

    Args:
        alerts: transitions or latest states; cleared episodes are left out.
        num_layers: number of MoE layers of the run.
    """
    by_rule: dict[str, list[AlertRecord]] = {}
    for alert in latest(alerts):
        if alert.cleared_step is None:
            by_rule.setdefault(alert.rule, []).append(alert)
    groups = []
    for same in by_rule.values():
        layers = {alert.layer for alert in same} - {None}
        merge = len(layers) > 1 and 2 * len(layers) > num_layers
        parts = [same] if merge else [[alert] for alert in same]
        groups += [_group(part, num_layers) for part in parts]
    return tuple(sorted(groups, key=lambda group: (-SEVERITIES.index(group.severity), group.first_step)))


def _group(alerts: list[AlertRecord], num_layers: int) -> AlertGroup:
    worst = max(alerts, key=lambda alert: (SEVERITIES.index(alert.severity), -alert.raised_step))
    message = worst.message
    if len(alerts) > 1:
        message = f"{rule(worst.rule).title} in {len(alerts)} of {num_layers} layers. Worst: {worst.message}"
    return AlertGroup(
        rule=worst.rule,
        severity=worst.severity,
        first_step=min(alert.raised_step for alert in alerts),
        message=message,
        remedy=worst.remedy,
        alerts=tuple(sorted(alerts, key=lambda alert: -1 if alert.layer is None else alert.layer)),
    )
