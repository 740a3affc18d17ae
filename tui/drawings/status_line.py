"""The two lines at the top: which run, in what state, how far behind, how far along; and the screens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from moeviz.colors import SEVERITY_MARKS
from moeviz.live import Snapshot
from moeviz.records import Severity
from tui import quantities
from tui.ink import Ink
from tui.lines import Line, Row

SEVERITIES: tuple[Severity, ...] = ("critical", "error", "warning", "info")
STATES = {
    "waiting": ("○", "muted", "waiting"),
    "live": ("●", "good", "live"),
    "stale": ("◐", "warning", "stale"),
    "ended": ("■", "accent", "ended"),
    "dead": ("✕", "critical", "presumed dead"),
    "unreadable": ("✕", "critical", "unreadable"),
}


@dataclass(frozen=True, kw_only=True)
class Status:
    """What the top line says; made anew every tick, so it keeps moving while the rest is paused."""

    run_name: str
    latest: Snapshot | None = None
    behind_seconds: float = 0.0
    held_step: int | None = None
    """The step that is on the screen when it is not the newest."""
    replay: int = 0
    """Ticks a refresh while a replay runs, else 0."""
    trouble: str = ""
    """Why no new snapshot could be had, if so."""
    leaving_in: float | None = None
    """Seconds until the view closes by itself."""
    muted: frozenset[str] = frozenset()


def draw_status(status: Status, ink: Ink, width: int) -> Row:
    """One row; what matters least disappears first on a narrow terminal."""
    bar = "bar"
    line = (
        Line(ink, width)
        .put(" moeviz ", "accent", bold=True, on=bar)
        .put(f" {status.run_name}  ", "strong", on=bar, bold=True)
    )
    right = _alert_words(status)
    right_cells = sum(len(text) for text, _ in right)
    for text, style in _state_words(status):
        line.put(text, style, on=bar)
    room = width - line.used - right_cells
    progress = _progress(status, room)
    if progress:
        line.put(progress, "text", on=bar)
    line.to(width - right_cells, on=bar)
    for text, style in right:
        line.put(text, style, on=bar)
    return line.row(on=bar)


def _state_words(status: Status) -> list[tuple[str, str]]:
    shot = status.latest
    if status.trouble:
        return [("✕ ", "critical"), (f"feed: {status.trouble}  ", "critical")]
    if shot is None:
        return [("○ opening  ", "muted")]
    mark, style, word = STATES[shot.state]
    words = [(f"{mark} {word}", style), (f" {_how_long(shot, status.behind_seconds)}  ", "muted")]
    if status.leaving_in is not None:
        words.append((f"leaving in {status.leaving_in:.0f} s, any key stays  ", "strong"))
    elif status.replay:
        words.append((f"▶ replay {status.replay}× at {quantities.count(status.held_step or 0)}  ", "strong"))
    elif status.held_step is not None:
        words.append((f"‖ paused at {quantities.count(status.held_step)}  ", "strong"))
    return words


def _how_long(shot: Snapshot, behind: float) -> str:
    if shot.state == "waiting":
        return "for the first step"
    if shot.state == "ended":
        return f"{quantities.duration(behind)} ago"
    if shot.state == "dead":
        return f"no write for {quantities.duration(behind)}"
    return f"{quantities.duration(behind)} behind"


def _progress(status: Status, room: int) -> str:
    shot = status.latest
    if shot is None or shot.step < 0:
        return ""
    step = f"step {quantities.count(shot.step)}"
    planned = f" / {quantities.count(shot.planned_steps)}" if shot.planned_steps else ""
    series = shot.scalars.get("tokens_per_second")
    speed = (
        f"  {quantities.count(float(series.values[-1]))} tok/s"
        if series is not None and len(series.values)
        else ""
    )
    share = min((shot.step + 1) / shot.planned_steps, 1.0) if shot.planned_steps else 0.0
    gauge = "  " + "━" * round(share * 10) + "╌" * (10 - round(share * 10)) if shot.planned_steps else ""
    for words in (step + planned + gauge + speed, step + planned + speed, step + planned, step):
        if len(words) + 2 <= room:
            return words
    return ""


def _alert_words(status: Status) -> list[tuple[str, str]]:
    if status.latest is None:
        return []
    counts = Counter(
        alert.severity for alert in status.latest.open_alerts if alert.episode not in status.muted
    )
    words: list[tuple[str, str]] = [
        (f"{SEVERITY_MARKS[severity]} {counts[severity]} {severity}  ", severity)
        for severity in SEVERITIES
        if counts[severity] and (severity != "info" or len(counts) == 1)
    ]
    return words or [("✓ no alerts  ", "good")]


def draw_tabs(names: tuple[tuple[str, str, str], ...], current: str, ink: Ink, width: int) -> Row:
    """The screens with the key of each: (id, key, label)."""
    line = Line(ink, width).put(" ")
    short = sum(len(key) + len(label) + 4 for _, key, label in names) > width
    for name, key, label in names:
        here = name == current
        text = label[:4] if short and not here else label
        line.put(f" {key} ", "accent" if here else "faint", bold=here, on="band" if here else None)
        line.put(f"{text} ", "strong" if here else "muted", bold=here, on="band" if here else None).put(" ")
    return line.row()


def draw_keys(keys: list[tuple[str, str]], ink: Ink, width: int) -> Row:
    """The footer: key and label of each action, closer together where there is little room."""
    needed = sum(len(key) + len(label) + 2 for key, label in keys)
    gap = min(max((width - needed) // max(len(keys), 1), 1), 3)
    line = Line(ink, width).put(" ", on="bar")
    for key, label in keys:
        line.put(key, "accent", bold=True, on="bar").put(f" {label}{' ' * gap}", "muted", on="bar")
    return line.row(on="bar")
