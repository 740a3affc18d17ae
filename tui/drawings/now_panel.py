"""The numbers of this moment, each with its unit, its place and its course over the history."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moeviz.live import Snapshot
from tui import quantities
from tui.ink import Ink
from tui.lines import Line, Panel, Row, Summary, filled, paragraph, resample, sparkline
from tui.scene import Scene, dead_LE, entropy_style, highest_load, worst_entropy

_LABEL, _VALUE, _PLACE = 14, 9, 14
_SIDE_BY_SIDE = 56
"""From this width on a course stands beside its number, below it otherwise."""


class Course(NamedTuple):
    """A series and the range it is drawn over."""

    values: np.ndarray
    low: float
    high: float
    keep: Summary = "mean"


class Figure(NamedTuple):
    """One number of the panel."""

    label: str
    value: str
    place: str = ""
    style: str = "strong"
    course: Course | None = None


def draw_now_panel(scene: Scene, ink: Ink, width: int, height: int) -> Panel:
    """Loss, evenness and load with their courses, then whatever else was recorded."""
    figures = [*_routing_figures(scene.snapshot), *_training_figures(scene.snapshot)]
    notes = [row for note in scene.snapshot.notes for row in paragraph(note, ink, width, "warning")]
    below = width < _SIDE_BY_SIDE
    spare = height - len(figures) - len(notes)
    rows: list[Row] = []
    for figure in figures:
        rows.append(_figure_row(figure, ink, width, beside=not below))
        if below and figure.course is not None and spare > 0:
            rows.append(Line(ink, width).put(_drawn(figure.course, width), "accent").row())
            spare -= 1
    return Panel("now", filled([*rows, *notes], ink, width, height))


def _figure_row(figure: Figure, ink: Ink, width: int, *, beside: bool) -> Row:
    line = Line(ink, width).put(figure.label, "muted", _LABEL)
    if beside:
        line.put(figure.value, figure.style, _VALUE, align="right", bold=True).put("  ").put(
            figure.place, "muted", _PLACE
        )
        return line.put(_drawn(figure.course, line.room) if figure.course else "", "accent").row()
    line.put(figure.place, "muted", max(line.room - _VALUE, 0))
    return line.put(figure.value, figure.style, _VALUE, align="right", bold=True).row()


def _drawn(course: Course, width: int) -> str:
    return sparkline(resample(course.values, width, course.keep), course.low, course.high, width)


def _routing_figures(shot: Snapshot) -> list[Figure]:
    figures = [_loss_figure(shot)]
    worst, highest = worst_entropy(shot), highest_load(shot)
    if worst is not None:
        style = entropy_style(worst.value, "strong")
        course = Course(np.nanmin(shot.load_entropy_TL, axis=1), 0.0, 1.0, "min")
        figures.append(Figure("worst H/ln E", f"{worst.value:.2f}", f"L{worst.layer}", style, course))
    if highest is not None:
        most = max(layer.num_experts / layer.top_k for layer in shot.info.layers)
        logs = np.log2(np.maximum(np.nanmax(shot.max_load_TL, axis=1), 1))
        place = f"L{highest.layer} E{highest.expert}"
        course = Course(logs, 0.0, math.log2(most), "max")
        figures.append(Figure("highest load", quantities.ratio(highest.value), place, course=course))
    if worst is not None:
        used, of = float(shot.n_eff_L[worst.layer]), shot.info.layers[worst.layer].num_experts
        figures.append(Figure("experts used", f"{used:.1f}", f"of {of} in L{worst.layer}", style))
    dead, total = int(dead_LE(shot).sum()), sum(layer.num_experts for layer in shot.info.layers)
    figures.append(
        Figure("dead experts", str(dead), f"of {quantities.count(total)}", "error" if dead else "strong")
    )
    return [*figures, _drop_figure(shot)]


def _loss_figure(shot: Snapshot) -> Figure:
    series = shot.scalars.get("loss")
    if series is None or not len(series.values):
        return Figure("loss", quantities.MISSING)
    finite = series.values[np.isfinite(series.values)]
    newest = float(series.values[-1])
    if not math.isfinite(newest) or not len(finite):
        return Figure("loss", "NaN" if math.isnan(newest) else "inf", style="critical")
    return Figure("loss", quantities.number(newest), course=Course(series.values, finite.min(), finite.max()))


def _drop_figure(shot: Snapshot) -> Figure:
    if not np.isfinite(shot.drop_rate_L).any():
        return Figure("dropped", quantities.MISSING)
    layer = int(np.nanargmax(shot.drop_rate_L))
    drop = float(shot.drop_rate_L[layer])
    place = f"L{layer}" if drop > 0 else ""
    return Figure("dropped", quantities.percent(drop), place, "warning" if drop > 0.01 else "strong")


_TRAINING: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("val_loss", "val. loss", quantities.number),
    ("lr", "learning rate", quantities.number),
    ("grad_norm", "grad. norm", quantities.number),
    ("tokens_per_second", "tokens/s", quantities.count),
    ("probe_churn", "probe churn", quantities.percent),
)


def _training_figures(shot: Snapshot) -> list[Figure]:
    figures = []
    for name, label, say in _TRAINING:
        series = shot.scalars.get(name)
        if series is not None and len(series.values) and np.isfinite(series.values).any():
            course = Course(series.values, 0.0, float(np.nanmax(series.values)))
            figures.append(Figure(label, say(float(series.values[-1])), course=course))
    if shot.dropped_samples:
        figures.append(Figure("lost samples", quantities.count(shot.dropped_samples), "recorder", "warning"))
    return figures
