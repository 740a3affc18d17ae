"""Where tokens go from one layer to the next: every pair of experts as a cell, the strongest routes in words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeviz.colors import load_level
from tui import quantities
from tui.archive import Flow
from tui.heat import TEXT_WIDTH, Grid, fit, full_lines, half_lines, mark_lines, pool_extreme, ruler
from tui.ink import LEVELS, Ink
from tui.lines import Line, Panel, Row, filled, message_rows

MIN_ROUTE_SHARE = 0.25
"""A route is listed when it carries at least this part of an even pair's traffic: rarer ones are chance."""


@dataclass(frozen=True, eq=False)
class FlowScene:
    """What the Flow screen shows: the flow out of one layer and the pair under the cursor."""

    flow: Flow | None
    source: int = 0
    target: int = 0
    message: str = ""

    @property
    def key(self) -> object:
        flow = None if self.flow is None else (self.flow.layer, self.flow.steps, self.flow.tokens)
        return (flow, self.source, self.target, self.message)


def noise_log2(flow: Flow) -> float:
    """Half width in log2 of what chance alone does to the lift of an even pair, twice its deviation, 0.25 to 1."""
    pairs = flow.counts_EE.size
    return float(np.clip(2 * 1.44 / np.sqrt(max(flow.counts_EE.sum(), 1) / max(pairs, 1)), 0.25, 1.0))


def draw_flow_map(scene: FlowScene, ink: Ink, width: int, height: int) -> Panel:
    """Rows are experts of the layer, columns those of the next; orange is more often than chance, blue less."""
    flow = scene.flow
    if flow is None:
        return Panel("flow", message_rows(scene.message, ink, width, height))
    margin = len(str(flow.counts_EE.shape[0] - 1)) + 2
    num_rows, num_columns = flow.counts_EE.shape
    grid = fit(num_rows, num_columns, width - margin, height - 2, cursor=scene.source, marks=ink.marks)
    rows = [ruler(ink, grid, margin, width, scene.target).row()]
    for line, row in enumerate(_body(scene, flow, grid, ink)):
        upper = grid.row_at(line)
        on_label_line = upper is not None and grid.line_of(upper) == line
        here = on_label_line and grid.line_of(scene.source) == line
        spaced = grid.style == "full" or line % 2 == 0
        label = str(scene.source if here else upper) if here or (on_label_line and spaced) else ""
        built = Line(ink, width).put(
            f"{label} ", "strong" if here else "faint", margin, align="right", bold=here
        )
        rows.append(built.extend(row).row())
    rows = [*filled(rows, ink, width, height - 1), _reading(scene, flow, ink, width)]

    def spot(x: int, y: int) -> tuple[int, int] | None:
        source, target = grid.row_at(y - 1), grid.column_at(x - margin) if x >= margin else None
        return None if y < 1 or source is None or target is None else (source, target)

    title = f"flow from layer {flow.layer} (rows) to layer {flow.next_layer} (columns) · lift over chance"
    if grid.pool > 1:
        title += f" · {grid.pool} a cell, the largest shown"
    note = f"{quantities.count(flow.tokens)} sampled tokens · {flow.steps}"
    if grid.num_rows < num_rows:
        note = f"rows {grid.first_row} to {grid.first_row + grid.num_rows - 1} of {num_rows} · " + note
    return Panel(title, rows, note, spot)


def _body(scene: FlowScene, flow: Flow, grid: Grid, ink: Ink) -> list[Row]:
    shown = slice(grid.first_row, grid.first_row + grid.num_rows)
    with np.errstate(divide="ignore"):
        logs = np.maximum(np.log2(flow.lift_EE[shown]), -9.0)
    pooled = pool_extreme(logs, grid.pool)
    ramp = ink.load
    levels = load_level(2.0**pooled, noise_log2(flow), LEVELS).astype(np.int64)
    levels[np.isnan(pooled)] = ramp.blank
    row, column = scene.source - grid.first_row, scene.target // grid.pool
    if grid.cell_width >= TEXT_WIDTH and grid.style == "full" and not ink.marks:
        texts = [
            ["" if np.isnan(log) else quantities.ratio(2.0**log) for log in logs] for logs in pooled.tolist()
        ]
        return full_lines(levels, ramp, ink, grid, texts, (row, column))
    if 0 <= row < levels.shape[0] and 0 <= column < levels.shape[1]:
        levels[row, column] = ramp.cursor
    if ink.marks:
        marks = [[_mark(value) for value in values] for values in pooled.tolist()]
        return mark_lines(marks, levels, ramp, ink, grid)
    if grid.style == "half":
        return half_lines(levels, ramp, grid.cell_width)
    return full_lines(levels, ramp, ink, grid)


def _mark(log: float) -> str:
    if np.isnan(log):
        return " "
    return "#" if log > 2 else "+" if log > 1 else "-" if log < -1 else "."


def _reading(scene: FlowScene, flow: Flow, ink: Ink, width: int) -> Row:
    lift = float(flow.lift_EE[scene.source, scene.target])
    total = flow.counts_EE.sum()
    line = Line(ink, width).put(f"E{scene.source} → E{scene.target}", "strong", bold=True)
    if np.isfinite(lift) and total:
        share = flow.counts_EE[scene.source, scene.target] / flow.counts_EE[scene.source].sum()
        line.put(f"  {quantities.ratio(lift)} chance", "strong")
        line.put(f"   {quantities.percent(share)} of what leaves E{scene.source}", "text")
    else:
        line.put("  no sampled token used both", "muted")
    return line.row()


def draw_routes(scene: FlowScene, ink: Ink, width: int, height: int) -> Panel:
    """The pairs with the largest lift among those that carry real traffic."""
    flow = scene.flow
    if flow is None:
        return Panel("strongest routes", message_rows("", ink, width, height))
    head = (
        Line(ink, width)
        .put("route", "faint", 13)
        .put("lift", "faint", 8, align="right")
        .put("traffic", "faint", 10, align="right")
    )
    rows = [head.row()]
    for source, target, lift, share in strongest_routes(flow, max(height - 1, 1)):
        here = (source, target) == (scene.source, scene.target)
        line = Line(ink, width).put(f"E{source} → E{target}", "strong" if here else "text", 13, bold=here)
        line.put(quantities.ratio(lift), "text", 8, align="right")
        rows.append(line.put(quantities.percent(share), "muted", 10, align="right").row())
    return Panel("strongest routes", filled(rows, ink, width, height))


def strongest_routes(flow: Flow, most: int) -> list[tuple[int, int, float, float]]:
    """(expert, expert of the next layer, lift, share of all traffic): more often than by chance, largest lift first."""
    total = flow.counts_EE.sum()
    if total == 0:
        return []
    share = flow.counts_EE / total
    lift = np.where(share >= MIN_ROUTE_SHARE / flow.counts_EE.size, np.nan_to_num(flow.lift_EE, nan=0.0), 0.0)
    order = np.argsort(-lift, axis=None, kind="stable")[:most]
    pairs = zip(*np.unravel_index(order, lift.shape), strict=True)
    return [(int(i), int(j), float(lift[i, j]), float(share[i, j])) for i, j in pairs if lift[i, j] > 1]
