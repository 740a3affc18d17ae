"""The runs of a folder, one a line."""

from __future__ import annotations

import math

from tui import quantities
from tui.archive import RunRow
from tui.drawings.status_line import STATES
from tui.ink import Ink
from tui.lines import Line, Panel, Row, filled, message_rows

_COLUMNS = (
    ("run", 23),
    ("state", 16),
    ("step", 17),
    ("  experts", 18),
    ("loss", 8),
    ("worst H/ln E", 13),
    ("alerts", 7),
    ("created", 12),
)
_RIGHT = {"step", "loss", "worst H/ln E", "alerts", "created"}


def draw_run_table(
    runs: list[RunRow], selected: int, current: str, message: str, ink: Ink, width: int, height: int
) -> Panel:
    """`current` is the path of the run that is open; `message` is said while there is no list."""
    if not runs:
        return Panel("runs", message_rows(message, ink, width, height))
    head = Line(ink, width).put("  ")
    for name, cells in _COLUMNS:
        head.put(name, "faint", cells, align="right" if name in _RIGHT else "left")
    room = max(height - 2, 1)
    first = min(max(selected - room // 2, 0), max(len(runs) - room, 0))
    rows = [head.row()]
    for index, run in enumerate(runs[first : first + room], first):
        rows.append(_run_row(run, index == selected, str(run.path) == current, ink, width))
    return Panel(
        f"runs · {len(runs)}",
        filled(rows, ink, width, height),
        str(runs[selected].path),
        lambda _x, y: (first + y - 1, 0) if 0 < y <= min(room, len(runs) - first) else None,
    )


def _run_row(run: RunRow, selected: bool, current: bool, ink: Ink, width: int) -> Row:
    on = "band" if selected else None
    mark, style, word = STATES[run.state]
    planned = f" / {quantities.count(run.planned_steps)}" if run.planned_steps else ""
    worst = "critical" if run.worst_entropy < 0.7 else "warning" if run.worst_entropy < 0.85 else "text"
    cells = (
        (run.name, "strong" if selected else "text"),
        (f"{mark} {word}", style),
        (quantities.count(run.step) + planned if run.step >= 0 else quantities.MISSING, "text"),
        (f"  {run.shape}", "muted"),
        (quantities.number(run.loss), "text"),
        (f"{run.worst_entropy:.2f}" if math.isfinite(run.worst_entropy) else quantities.MISSING, worst),
        (
            str(run.open_alerts) if run.open_alerts else quantities.MISSING,
            "warning" if run.open_alerts else "faint",
        ),
        (f"{quantities.duration(run.age_seconds)} ago", "muted"),
    )
    line = Line(ink, width).put("▸ " if current else "  ", "accent", on=on)
    for (name, room), (text, color) in zip(_COLUMNS, cells, strict=True):
        line.put(text, color, room, align="right" if name in _RIGHT else "left", on=on)
    return line.row(on=on)
