"""Entropy per layer over time, one row a layer: when did which layer begin to lose experts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tui import quantities
from tui.heat import MAX_CELL_HEIGHT, Grid, full_lines, half_lines
from tui.ink import Ink
from tui.lines import Line, Panel, Row, filled, sparkline
from tui.scene import Scene, entropy_style, entropy_TL

FLOOR = 0.3
"""Normalised entropy at which the ramp is at its brightest: below, a layer is lost anyway."""
MAX_TICK_WIDTH = 4
"""Columns of a tick while there are few of them."""
_TITLES = {"load": "load entropy by layer · H/ln E", "token": "token entropy by layer · H/ln E"}
_TAIL = 4


class _Plan(NamedTuple):
    """Where things go: lines per row, layers per row, columns per tick."""

    grid: Grid
    group: int
    tick: int
    margin: int
    columns: int


def draw_entropy_rows(scene: Scene, ink: Ink, width: int, height: int) -> Panel:
    """Newest tick at the right; healthy layers rest in the page, a layer that concentrates lights up.

    Where not all layers have a line, neighbours share one and the worst of them is shown.
    """
    history_TL = entropy_TL(scene)
    title = _TITLES[scene.eye.entropy]
    if not len(history_TL) or np.isnan(history_TL).all():
        words = "not recorded" if scene.snapshot.step >= 0 else "no step yet"
        return Panel(title, filled([Line(ink, width).put(words, "muted").row()], ink, width, height))
    plan = _plan(scene, ink, width, height - 1, len(history_TL))
    values_TL = history_TL[-(plan.columns // plan.tick) :]
    worst_RT = _pooled(values_TL.T, plan.group)
    rows = [
        _labelled(row, line, worst_RT[:, -1], scene, ink, width, plan)
        for line, row in enumerate(_cells(worst_RT, ink, plan))
    ]
    rows.append(_axis(scene, ink, width, plan, len(values_TL)))
    note = f"{plan.group} layers a row, the worst shown" if plan.group > 1 else ""
    return Panel(f"{title} · last {len(values_TL)} ticks", filled(rows, ink, width, height), note)


def _plan(scene: Scene, ink: Ink, width: int, height: int, ticks: int) -> _Plan:
    margin = len(str(max(scene.num_layers - 1, 0))) + 1
    columns = max(width - margin - _TAIL, 1)
    group = -(-scene.num_layers // max(height * (1 if ink.marks else 2), 1))
    num_rows = -(-scene.num_layers // group)
    half = num_rows > height
    tall = 1 if half else min(max(height // num_rows, 1), MAX_CELL_HEIGHT)
    tick = min(max(columns // ticks, 1), MAX_TICK_WIDTH)
    return _Plan(
        Grid("half" if half else "full", num_rows, 0, columns, 1, 1, tall), group, tick, margin, columns
    )


def _pooled(values_LT: np.ndarray, group: int) -> np.ndarray:
    """Smallest entropy of each `group` of neighbouring layers; NaN only where all are."""
    pad = -len(values_LT) % group
    padded = np.pad(values_LT, ((0, pad), (0, 0)), constant_values=np.nan)
    smallest = np.where(np.isnan(padded), np.inf, padded).reshape(-1, group, values_LT.shape[1]).min(axis=1)
    return np.where(np.isinf(smallest), np.nan, smallest)


def _cells(values_RT: np.ndarray, ink: Ink, plan: _Plan) -> list[Row]:
    stretched = np.repeat(values_RT, plan.tick, axis=1)
    if ink.marks:
        lines = [sparkline(row, FLOOR, 1.0, plan.columns) for row in stretched]
        blank = Line(ink, plan.columns).row()
        return [
            Line(ink, plan.columns).put(line, "text").row()
            if at == (plan.grid.cell_height - 1) // 2
            else blank
            for line in lines
            for at in range(plan.grid.cell_height)
        ]
    ramp = ink.evenness
    at = np.clip((stretched - FLOOR) / (1 - FLOOR), 0, 1)
    levels = np.where(np.isnan(at), ramp.blank, np.rint(np.nan_to_num(at) * ramp.top)).astype(np.int64)
    early = np.full((len(levels), plan.columns - levels.shape[1]), ramp.blank)
    levels = np.hstack([early, levels])
    return half_lines(levels, ramp) if plan.grid.style == "half" else full_lines(levels, ramp, ink, plan.grid)


def _labelled(
    row: Row, line: int, newest_R: np.ndarray, scene: Scene, ink: Ink, width: int, plan: _Plan
) -> Row:
    upper, lower = plan.grid.row_at(line), plan.grid.row_at(line, lower=True)
    assert upper is not None
    if plan.grid.line_of(upper) != line:
        return Line(ink, width).put("", width=plan.margin).extend(row).row()
    here = line == plan.grid.line_of(scene.layer // plan.group)
    shown = [upper] if lower is None or plan.grid.style == "full" else [upper, lower]
    value = float("nan") if np.isnan(newest_R[shown]).all() else float(np.nanmin(newest_R[shown]))
    label = scene.layer if here else upper * plan.group
    built = Line(ink, width).put(
        f"{label} ", "strong" if here else "faint", plan.margin, align="right", bold=here
    )
    built.extend(row).put(" ")
    return built.put(
        quantities.unit(value), entropy_style(value) if scene.eye.entropy == "load" else "muted"
    ).row()


def _axis(scene: Scene, ink: Ink, width: int, plan: _Plan, ticks: int) -> Row:
    steps = scene.snapshot.history_steps_T[-ticks:]
    end = plan.margin + plan.columns
    first, last = f"step {quantities.count(steps[0])}", quantities.count(steps[-1])
    line = Line(ink, width).to(max(end - ticks * plan.tick, plan.margin))
    if line.used + len(first) + len(last) + 2 <= end:
        line.put(first, "faint")
    return line.to(end - len(last)).put(last, "faint").row()
