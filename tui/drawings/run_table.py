"""The runs of a folder, one a line."""

from __future__ import annotations

from tui import quantities
from tui.archive import RunRow
from tui.drawings.status_line import STATES
from tui.ink import Ink
from tui.lines import Line, Panel, Row, filled, message_rows
from tui.scene import entropy_style

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
_NARROW = (("run", 14), ("state", 16), ("step", 16), ("loss", 8), ("worst H/ln E", 13), ("alerts", 7))
_RIGHT = {"step", "loss", "worst H/ln E", "alerts", "created"}


def draw_run_table(
    runs: list[RunRow], selected: int, current: str, message: str, ink: Ink, width: int, height: int
) -> Panel:
    """`current` is the path of the run that is open; `message` is said while there is no list."""
    if not runs:
        return Panel("runs", message_rows(message, ink, width, height))
    columns = _COLUMNS if width >= 2 + sum(cells for _, cells in _COLUMNS) else _NARROW
    head = Line(ink, width).put("  ")
    for name, cells in columns:
        head.put(name, "faint", cells, align="right" if name in _RIGHT else "left")
    room = max(height - 2, 1)
    first = min(max(selected - room // 2, 0), max(len(runs) - room, 0))
    rows = [head.row()]
    for index, run in enumerate(runs[first : first + room], first):
        rows.append(_run_row(run, columns, index == selected, str(run.path) == current, ink, width))
    return Panel(
        f"runs · {len(runs)}",
        filled(rows, ink, width, height),
        str(runs[selected].path),
        lambda _x, y: (first + y - 1, 0) if 0 < y <= min(room, len(runs) - first) else None,
    )


def _run_row(
    run: RunRow, columns: tuple[tuple[str, int], ...], selected: bool, current: bool, ink: Ink, width: int
) -> Row:
    on = "band" if selected else None
    mark, style, word = STATES[run.state]
    planned = f" / {quantities.count(run.planned_steps)}" if run.planned_steps else ""
    cells = {
        "run": (run.name, "strong" if selected else "text"),
        "state": (f"{mark} {word}", style),
        "step": (quantities.count(run.step) + planned if run.step >= 0 else quantities.MISSING, "text"),
        "  experts": (f"  {run.shape}", "muted"),
        "loss": (quantities.number(run.loss), "text"),
        "worst H/ln E": (quantities.fixed(run.worst_entropy), entropy_style(run.worst_entropy, "text")),
        "alerts": (str(run.open_alerts or quantities.MISSING), "warning" if run.open_alerts else "faint"),
        "created": (f"{quantities.duration(run.age_seconds)} ago", "muted"),
    }
    line = Line(ink, width).put("▸ " if current else "  ", "accent", on=on)
    for name, room in columns:
        text, color = cells[name]
        line.put(text, color, room, align="right" if name in _RIGHT else "left", on=on)
    return line.row(on=on)
