"""The alert list: severity in words and shapes, where, since when, what it means and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dashboards.components import component, grouped
from moeviz.colors import SEVERITY_MARKS
from moeviz.live import Snapshot
from moeviz.records import AlertRecord


def alerts(snapshot: Snapshot, on_select: Callable[[], None]) -> None:
    component("alerts")(key="alerts", data=alerts_data(snapshot), on_cell_change=on_select)


def alerts_data(snapshot: Snapshot) -> dict[str, Any]:
    """Open episodes, worst first, then cleared ones."""
    cleared = [alert for alert in snapshot.alerts if alert.cleared_step is not None]
    return {
        "open": [alert_row(alert, snapshot.step) for alert in snapshot.open_alerts],
        "cleared": [alert_row(alert, snapshot.step) for alert in cleared],
        "calm": "No alert is open: every layer spreads its tokens within the limits of the rules.",
    }


def alert_row(alert: AlertRecord, step: int) -> dict[str, Any]:
    experts = ", ".join(map(str, alert.experts[:8])) + (" …" if len(alert.experts) > 8 else "")
    where = "Whole run" if alert.layer is None else f"Layer {alert.layer}"
    where += f" · expert{'s' if len(alert.experts) > 1 else ''} {experts}" if experts else ""
    if alert.cleared_step is None:
        when = f"since step {grouped(alert.raised_step)} · {grouped(max(step - alert.raised_step, 0))} steps"
    else:
        when = f"steps {grouped(alert.raised_step)} to {grouped(alert.cleared_step)}"
    return {
        "severity": alert.severity,
        "mark": SEVERITY_MARKS[alert.severity],
        "word": alert.severity.upper(),
        "where": where,
        "rule": alert.rule,
        "when": when,
        "message": alert.message,
        "remedy": alert.remedy,
        "layer": alert.layer,
        "expert": alert.experts[0] if alert.experts else None,
    }
