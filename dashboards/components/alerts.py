"""The alert list: severity in words and shapes, where, since when, what it means and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dashboards.components import component, grouped
from moeviz.alerts import grouping
from moeviz.alerts.grouping import AlertGroup
from moeviz.colors import SEVERITY_MARKS
from moeviz.live import Snapshot
from moeviz.records import AlertRecord, Severity

_MOST_NAMED = 8
"""Layers or experts named in one row."""


def alerts(snapshot: Snapshot, on_select: Callable[[], None]) -> None:
    component("alerts")(key="alerts", data=alerts_data(snapshot), on_cell_change=on_select)


def alerts_data(snapshot: Snapshot) -> dict[str, Any]:
    """Open alerts, worst first, one row where most layers complain alike; then cleared episodes."""
    cleared = [alert for alert in snapshot.alerts if alert.cleared_step is not None]
    return {
        "open": [
            _open_row(group, snapshot.step)
            for group in grouping.grouped(snapshot.alerts, snapshot.info.num_layers)
        ],
        "cleared": [_cleared_row(alert) for alert in cleared],
        "calm": "No alert is open: every layer spreads its tokens within the limits of the rules.",
    }


def _open_row(group: AlertGroup, step: int) -> dict[str, Any]:
    first = group.alerts[0]
    lasted = grouped(max(step - group.first_step, 0))
    return {
        **_row(group.severity, group.rule, group.message, group.remedy),
        "where": _where(group.layers, first.experts if len(group.alerts) == 1 else ()),
        "when": f"since step {grouped(group.first_step)} · {lasted} steps",
        "layer": first.layer,
        "expert": first.experts[0] if first.experts else None,
    }


def _cleared_row(alert: AlertRecord) -> dict[str, Any]:
    assert alert.cleared_step is not None
    return {
        **_row(alert.severity, alert.rule, alert.message, alert.remedy),
        "where": _where(() if alert.layer is None else (alert.layer,), alert.experts),
        "when": f"steps {grouped(alert.raised_step)} to {grouped(alert.cleared_step)}",
        "layer": alert.layer,
        "expert": alert.experts[0] if alert.experts else None,
    }


def _row(severity: Severity, rule: str, message: str, remedy: str) -> dict[str, Any]:
    words = {"severity": severity, "mark": SEVERITY_MARKS[severity], "word": severity.upper()}
    return {**words, "rule": rule, "message": message, "remedy": remedy}


def _where(layers: Sequence[int], experts: Sequence[int]) -> str:
    place = f"Layer{'s' if len(layers) > 1 else ''} {_listed(layers)}" if layers else "Whole run"
    return f"{place} · expert{'s' if len(experts) > 1 else ''} {_listed(experts)}" if experts else place


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:_MOST_NAMED])) + (" …" if len(numbers) > _MOST_NAMED else "")
