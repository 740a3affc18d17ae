"""The layer x expert map: which experts get more or less than their even share, all of them, on one screen."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from rich.segment import Segment

from moeviz.colors import LOAD_LIMIT, load_level
from tui import quantities
from tui.drawings.alert_list import headline
from tui.heat import TEXT_WIDTH, Grid, fit, full_lines, half_lines, mark_lines, pool_extreme, ruler
from tui.ink import LEVELS, Ink, Ramp
from tui.lines import Line, Panel, Row, filled
from tui.scene import (
    Scene,
    coverage,
    coverage_LE,
    dead_LE,
    entropy_style,
    highest_load,
    noise_log2_L,
    worst_entropy,
)

_TITLES = {
    "step": "expert load · relative to an even share",
    "mean": "expert load · mean of about 20 steps",
    "share": "expert load · share of tokens",
    "change": "expert load · change",
}
_DEAD_LOG2 = -LOAD_LIMIT - 1


class Cells(NamedTuple):
    """The map's values after pooling, and the ramp they are drawn with."""

    values_RC: np.ndarray
    """What a cell stands for: relative load, share of tokens, or change; NaN where there is no expert."""
    levels_RC: np.ndarray
    ramp: Ramp


def draw_load_map(scene: Scene, ink: Ink, width: int, height: int) -> Panel:
    """The map with layer numbers, a column ruler, entropy per layer, a reading of the cell under the cursor."""
    grid, margin = map_grid(scene, ink, width, height)
    cells = _cells(scene, ink, grid)
    body = _body(cells, ink, grid, scene)
    rows = [_ruler(scene, ink, grid, margin, width)]
    rows += [_labelled(row, line, scene, ink, grid, margin, width) for line, row in enumerate(body)]
    rows += _spare(scene, ink, width, height - 1 - len(rows))
    rows = filled(rows, ink, width, height - 1)
    rows.append(_reading(scene, cells.ramp, ink, width))

    def spot(x: int, y: int) -> tuple[int, int] | None:
        layer, expert = grid.row_at(y - 1), grid.column_at(x - margin) if x >= margin else None
        return None if y < 1 or layer is None or expert is None else (layer, expert)

    return Panel(_title(scene), rows, _note(scene, grid), spot)


def map_grid(scene: Scene, ink: Ink, width: int, height: int) -> tuple[Grid, int]:
    """Cells of the map in a panel of this size, and the column at which they start."""
    margin = len(str(max(scene.num_layers - 1, 0))) + 1
    num_columns = max(scene.snapshot.info.max_experts, 1)
    for tail in (8, 4):  # entropies of two layers share a line in half blocks
        grid = fit(
            scene.num_layers,
            num_columns,
            width - margin - tail,
            height - 2,
            cursor=scene.layer,
            marks=ink.marks,
        )
        if grid.style == "half":
            break
    return grid, margin


def _cells(scene: Scene, ink: Ink, grid: Grid) -> Cells:
    snapshot = scene.snapshot
    shown = slice(grid.first_row, grid.first_row + grid.num_rows)
    if scene.scale == "share":
        values = pool_extreme(coverage_LE(snapshot)[shown], grid.pool)
        ramp = ink.sequential
        levels = np.rint(np.nan_to_num(np.clip(values, 0, 1)) * ramp.top).astype(np.int64)
    else:
        loads = _loads(scene)[shown]
        with np.errstate(divide="ignore"):
            logs = np.where(loads == 0, _DEAD_LOG2, np.log2(loads))
        pooled = pool_extreme(logs, grid.pool)
        values = np.where(pooled == _DEAD_LOG2, 0.0, 2.0**pooled)
        ramp = ink.load
        levels = load_level(values, noise_log2_L(snapshot)[shown, None], LEVELS).astype(np.int64)
        levels[levels < 0] = ramp.dead
    levels[np.isnan(values)] = ramp.blank
    return Cells(values, levels, ramp)


def _loads(scene: Scene) -> np.ndarray:
    snapshot = scene.snapshot
    if scene.scale == "mean":
        return snapshot.load_rel_ema_LE
    if scene.scale == "step":
        return snapshot.load_rel_LE
    if scene.reference is None:
        return np.full_like(snapshot.load_rel_LE, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(snapshot.load_rel_LE / scene.reference.load_rel_LE, 0, 2.0**LOAD_LIMIT)


def _body(cells: Cells, ink: Ink, grid: Grid, scene: Scene) -> list[Row]:
    cursor = (scene.layer - grid.first_row, scene.expert // grid.pool)
    texts = None
    if grid.cell_width >= TEXT_WIDTH:
        say = quantities.percent if scene.scale == "share" else quantities.ratio
        texts = [[_text(value, say) for value in row] for row in cells.values_RC.tolist()]
        if not ink.marks and grid.style == "full":
            return full_lines(cells.levels_RC, cells.ramp, ink, grid, texts, cursor)
    levels_RC = cells.levels_RC.copy()
    if 0 <= cursor[0] < levels_RC.shape[0] and 0 <= cursor[1] < levels_RC.shape[1]:
        levels_RC[cursor] = cells.ramp.cursor
    if ink.marks:
        return mark_lines(_marks(cells, scene, texts), levels_RC, cells.ramp, ink, grid)
    if grid.style == "half":
        return half_lines(levels_RC, cells.ramp, grid.cell_width)
    return full_lines(levels_RC, cells.ramp, ink, grid)


def _text(value: float, say: Callable[[float], str]) -> str:
    return "" if np.isnan(value) else "dead" if value == 0 else say(value)


def _marks(cells: Cells, scene: Scene, texts: list[list[str]] | None) -> list[list[str]]:
    marks = [[_mark(value, scene) for value in row] for row in cells.values_RC.tolist()]
    if texts is None:
        return marks
    pairs = zip(texts, marks, strict=True)
    return [
        [text if text in ("", "dead") else f"{text} {mark}" for text, mark in zip(*pair, strict=True)]
        for pair in pairs
    ]


def _mark(value: float, scene: Scene) -> str:
    """`x` dead, `-` below half, `.` about even, `+` above double, `#` above four times; tenths for shares."""
    if np.isnan(value):
        return " "
    if scene.scale == "share":
        return (
            "x" if value == 0 else "#" if value >= 0.95 else "." if value < 0.05 else str(round(value * 10))
        )
    if value == 0:
        return "x"
    return "#" if value > 4 else "+" if value > 2 else "-" if value < 0.5 else "."


def _ruler(scene: Scene, ink: Ink, grid: Grid, margin: int, width: int) -> Row:
    line = ruler(ink, grid, margin, width, scene.expert).to(margin + grid.width + 1)
    return line.put("H/ln E" if line.room >= 6 else "H", "faint").row()


def _labelled(row: Row, line: int, scene: Scene, ink: Ink, grid: Grid, margin: int, width: int) -> Row:
    built = Line(ink, width)
    upper = grid.row_at(line)
    on_label_line = upper is not None and grid.line_of(upper) == line
    here = on_label_line and line == grid.line_of(scene.layer)
    label = scene.layer if here else upper
    built.put(
        f"{label} " if on_label_line else "", "strong" if here else "faint", margin, align="right", bold=here
    )
    built.extend(row).put(" ")
    if on_label_line:
        for layer in (upper, grid.row_at(line, lower=True)) if grid.style == "half" else (upper,):
            if layer is not None:
                _put_entropy(built, scene, layer)
    return built.row()


def _put_entropy(line: Line, scene: Scene, layer: int) -> None:
    history = scene.snapshot.load_entropy_TL
    value = float(history[-1, layer]) if len(history) else float("nan")
    line.put(quantities.unit(value), entropy_style(value)).put(" ")


def _spare(scene: Scene, ink: Ink, width: int, lines: int) -> list[Row]:
    """Where the map leaves lines free (one pane at a time): the worst places and the first alerts, in words."""
    worst, highest = worst_entropy(scene.snapshot), highest_load(scene.snapshot)
    if lines < 3 or worst is None or highest is None:
        return []
    dead = int(dead_LE(scene.snapshot).sum())
    line = (
        Line(ink, width)
        .put("worst layer ", "muted")
        .put(f"L{worst.layer} H {worst.value:.2f}", entropy_style(worst.value, "text"))
    )
    line.put("   highest ", "muted").put(
        f"L{highest.layer} E{highest.expert} {quantities.ratio(highest.value)}", "text"
    )
    line.put("   dead ", "muted").put(str(dead), "error" if dead else "text")
    alerts = [alert for alert in scene.snapshot.open_alerts if alert.episode not in scene.eye.muted]
    rows = [Line(ink, width).row(), line.row()]
    return rows + [headline(alert, scene, ink, width) for alert in alerts[: lines - 3]]


def _reading(scene: Scene, ramp: Ramp, ink: Ink, width: int) -> Row:
    line = Line(ink, width)
    load_rel = scene.load_rel
    line.put(f"L{scene.layer} E{scene.expert}", "strong", bold=True).put("  ")
    if np.isnan(load_rel):
        line.put("no load recorded yet", "muted")
    else:
        line.put(quantities.ratio(load_rel), "strong", 6, align="right")
        line.put(f"  {quantities.percent(coverage(scene.snapshot, scene.layer, load_rel))} of tokens", "text")
        if load_rel == 0:
            line.put("  dead now", "critical")
    legend = _legend(scene, ramp, ink)
    cells = sum(len(segment.text) for segment in legend)
    return line.to(width - cells).extend(legend).row() if line.room > cells + 1 else line.row()


def _legend(scene: Scene, ramp: Ramp, ink: Ink) -> Row:
    if ink.marks:
        text = (
            "x 0   . <5 %   1-9 tenths   # all"
            if scene.scale == "share"
            else "x dead  - <1/2  . even  + >2x  # >4x"
        )
        return [Segment(text, ink.style("muted"))]
    sweep = [Segment(" ", ramp.cell(round(at * ramp.top / 15))) for at in range(16)]
    low, high = ("0 %", "100 %") if scene.scale == "share" else ("1/8", "8×")
    ends = (Segment(f"{low} ", ink.style("muted")), Segment(f" {high}", ink.style("muted")))
    if scene.scale == "share":
        return [ends[0], *sweep, ends[1]]
    return [
        Segment("× ", ink.style("strong")),
        Segment("dead  ", ink.style("muted")),
        ends[0],
        *sweep,
        ends[1],
    ]


def _title(scene: Scene) -> str:
    title = _TITLES[scene.scale]
    if scene.scale == "change":
        title += f" since step {quantities.count(scene.reference.step)}" if scene.reference else " · loading"
    return title


def _note(scene: Scene, grid: Grid) -> str:
    parts = [f"{grid.pool} experts a cell (most uneven)"] if grid.pool > 1 else []
    if grid.num_rows < scene.num_layers:
        parts.append(f"layers {grid.first_row} to {grid.first_row + grid.num_rows - 1} of {scene.num_layers}")
    info = scene.snapshot.info.layers[scene.layer] if scene.num_layers else None
    if info is not None:
        parts.append(f"top {info.top_k} of {info.num_experts}")
    return " · ".join(parts)
