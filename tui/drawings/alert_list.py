"""Alerts in words: what, where, since when; and in detail what it means and what to do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeviz.colors import SEVERITY_MARKS
from moeviz.records import AlertRecord
from tui import quantities
from tui.ink import Ink
from tui.lines import Line, Panel, Row, chart, filled, paragraph
from tui.scene import Scene

_CHART_LINES = 4
SEVERITY_WORDS = {"info": "INFO", "warning": "WARNING", "error": "ERROR", "critical": "CRITICAL"}


def rule_words(alert: AlertRecord) -> str:
    """`ROUTING_COLLAPSE` -> `routing collapse`."""
    return alert.rule.replace("_", " ").lower()


def place_words(alert: AlertRecord, most: int = 3) -> str:
    """`L11 E3,17,42`, with `+n` for experts beyond `most`; `run` where it is no layer's."""
    if alert.layer is None:
        return "run"
    experts = ",".join(str(expert) for expert in alert.experts[:most])
    more = f"+{len(alert.experts) - most}" if len(alert.experts) > most else ""
    return f"L{alert.layer}" + (f" E{experts}{more}" if experts else "")


def span_words(alert: AlertRecord) -> str:
    """`since 12 466`, or `12 466 to 12 910` of a cleared episode."""
    first = quantities.count(alert.raised_step)
    return (
        f"since {first}"
        if alert.cleared_step is None
        else f"{first} to {quantities.count(alert.cleared_step)}"
    )


def draw_alert_list(scene: Scene, ink: Ink, width: int, height: int) -> Panel:
    """The open alerts, worst first, each with its message as far as there is room."""
    shown = [alert for alert in scene.snapshot.open_alerts if alert.episode not in scene.eye.muted]
    rows: list[Row] = []
    if not shown:
        rows.append(Line(ink, width).put("✓ ", "good").put("nothing to report", "muted").row())
    for index, alert in enumerate(shown):
        left_after = len(shown) - index - 1
        rows.append(headline(alert, scene, ink, width))
        message = paragraph(alert.message, ink, width, "muted", indent=2)
        if len(rows) + len(message) + left_after <= height:
            rows += message
    if len(rows) > height:
        more = len(rows) - height + 1
        rows = [*rows[: height - 1], Line(ink, width).put(f"  and {more} more: press 5", "muted").row()]
    return Panel(f"alerts · {len(shown)} open" if shown else "alerts", filled(rows, ink, width, height))


def headline(alert: AlertRecord, scene: Scene, ink: Ink, width: int) -> Row:
    """Severity, rule and place of an alert in one row."""
    seen = alert.episode in scene.eye.acknowledged
    color = "muted" if seen else alert.severity
    line = Line(ink, width).put(f"{SEVERITY_MARKS[alert.severity]} ", color)
    line.put(SEVERITY_WORDS[alert.severity], color, bold=True).put(
        f" {rule_words(alert)} ", "muted" if seen else "text"
    )
    places = [place_words(alert, most) for most in (3, 2, 1)]
    return line.put(next((place for place in places if len(place) <= line.room), places[-1]), "strong").row()


_COLUMNS = (("", 2), ("severity", 10), ("rule", 19), ("where", 14), ("steps", 18), ("value", 8), ("limit", 8))
_RIGHT = ("value", "limit")


def draw_alert_table(
    scene: Scene, ink: Ink, width: int, height: int, alerts: Sequence[AlertRecord], selected: int
) -> Panel:
    """One alert a line, the selected one highlighted."""
    columns = _COLUMNS if width >= sum(cells for _, cells in _COLUMNS) else _COLUMNS[:-2]
    head = Line(ink, width)
    for name, cells in columns:
        head.put(name, "faint", cells, align="right" if name in _RIGHT else "left")
    rows = [head.row()]
    room = max(height - 1, 1)
    first = min(max(selected - room // 2, 0), max(len(alerts) - room, 0))
    for index, alert in enumerate(alerts[first : first + room], first):
        rows.append(_table_row(alert, scene, ink, width, [cells for _, cells in columns], index == selected))
    if not alerts:
        rows.append(Line(ink, width).put("no alert in this run so far", "muted").row())
    open_ones = sum(alert.cleared_step is None for alert in alerts)
    return Panel(
        f"alerts · {open_ones} open, {len(alerts) - open_ones} cleared",
        filled(rows, ink, width, height),
        "",
        lambda _x, y: (first + y - 1, 0) if 0 < y <= min(room, len(alerts) - first) else None,
    )


def _table_row(
    alert: AlertRecord, scene: Scene, ink: Ink, width: int, cells: list[int], selected: bool
) -> Row:
    quiet = (
        alert.cleared_step is not None
        or alert.episode in scene.eye.muted
        or alert.episode in scene.eye.acknowledged
    )
    color, text = ("muted", "muted") if quiet else (alert.severity, "text")
    on = "band" if selected else None
    state = (
        "muted"
        if alert.episode in scene.eye.muted
        else "seen"
        if alert.episode in scene.eye.acknowledged
        else ""
    )
    word = state or ("cleared" if alert.cleared_step is not None else SEVERITY_WORDS[alert.severity])
    values = (
        SEVERITY_MARKS[alert.severity],
        word,
        rule_words(alert),
        place_words(alert, 2),
        span_words(alert),
    )
    line = Line(ink, width)
    for at, value in enumerate(values):
        line.put(value, color if at < 2 else "strong" if selected else text, cells[at], bold=at == 1, on=on)
    for cell, number in zip(cells[5:], (alert.value, alert.threshold), strict=False):
        line.put(quantities.number(number), text, cell, align="right", on=on)
    return line.row(on=on)


def draw_alert_detail(scene: Scene, ink: Ink, width: int, height: int, alert: AlertRecord | None) -> Panel:
    """Everything about one alert: message, remedy, the numbers, and the layer's course around it."""
    if alert is None:
        row = Line(ink, width).put("no alert selected", "muted").row()
        return Panel("detail", filled([row], ink, width, height))
    blank = Line(ink, width).row()
    head = Line(ink, width).put(f"{SEVERITY_MARKS[alert.severity]} ", alert.severity)
    head.put(f"{SEVERITY_WORDS[alert.severity]}  ", alert.severity, bold=True).put(
        rule_words(alert), "strong", bold=True
    )
    rows = [head.row(), blank, *paragraph(alert.message, ink, width, "strong"), blank]
    rows += [Line(ink, width).put("what to do", "accent").row(), *paragraph(alert.remedy, ink, width), blank]
    rows += _course(scene, ink, width, alert)
    for label, value in _facts(alert):
        rows.append(Line(ink, width).put(label, "muted", 16).put(value, "text").row())
    return Panel("detail", filled(rows, ink, width, height))


def _facts(alert: AlertRecord) -> list[tuple[str, str]]:
    facts = [
        ("where", place_words(alert, 8)),
        ("steps", span_words(alert)),
        ("value now", quantities.number(alert.value)),
        ("worst value", quantities.number(alert.peak)),
        ("alert line", quantities.number(alert.threshold)),
    ]
    for name, value in alert.evidence.items():
        if isinstance(value, (int, float, str)):
            said = value if isinstance(value, str) else quantities.number(float(value))
            facts.append((name.replace("_", " "), said))
    return [*facts, ("rule", f"{alert.rule} v{alert.rule_version}")]


def _course(scene: Scene, ink: Ink, width: int, alert: AlertRecord) -> list[Row]:
    """The layer's load entropy as a line over the ticks around the alert, with a mark where it was raised."""
    steps = scene.snapshot.history_steps_T
    if alert.layer is None or not len(steps) or alert.layer >= scene.snapshot.load_entropy_TL.shape[1]:
        return []
    values = scene.snapshot.load_entropy_TL[:, alert.layer]
    raised = int(np.searchsorted(steps, alert.raised_step))
    start = max(min(raised - width // 2, len(steps) - width), 0)
    window = values[start : start + width]
    rows = [Line(ink, width).put(f"load entropy of layer {alert.layer}, 0 to 1", "accent").row()]
    lines = chart(window, 0.0, 1.0, len(window), _CHART_LINES)
    rows += [Line(ink, width).put(line, "muted", on="field").row() for line in lines]
    if 0 <= raised - start < len(window):
        rows.append(
            Line(ink, width).to(raised - start).put(f"▴ {quantities.count(alert.raised_step)}", "muted").row()
        )
    return [*rows, Line(ink, width).row()]
