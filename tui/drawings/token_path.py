"""One token through the model: its experts and gate weights in every layer, and who shares them."""

from __future__ import annotations

import math

import numpy as np
from rich.style import Style

from tui import quantities
from tui.drawings.token_text import TokenScene, hue_style, hues_of, printable
from tui.heat import Grid, fit, full_lines, half_lines, mark_lines
from tui.ink import Ink
from tui.lines import Line, Panel, Row, filled, message_rows


def draw_token_path(scene: TokenScene, ink: Ink, width: int, height: int) -> Panel:
    """One token: its experts and gate weights in every layer."""
    trace = scene.trace
    if trace is None or not trace.texts:
        return Panel("token", message_rows("", ink, width, height))
    text = printable(trace.texts[scene.token])
    head = Line(ink, width).put(
        f"“{text}”" if not ink.ascii else f'"{text}"', "strong", min(max(width - 22, 8), 24), bold=True
    )
    loss = float(trace.loss_S[scene.token])
    head.put(f"token {scene.token}  ", "muted")
    head.put(f"loss {loss:.2f}" if math.isfinite(loss) else "", "text")
    rows = [head.row()]
    room = max(height - 2, 1)
    count = len(trace.layers)
    first = min(max(scene.layer - room // 2, 0), max(count - room, 0))
    hues = hues_of(scene)
    rows.append(Line(ink, width).put("layer", "faint", 6).put("experts and gate weights", "faint").row())
    for index in range(first, min(first + room, count)):
        rows.append(_path_row(scene, index, hues, ink, width))
    note = (
        f"layers {trace.layers[first]} to {trace.layers[min(first + room, count) - 1]} of {count}"
        if count > room
        else ""
    )
    return Panel("token under the cursor", filled(rows, ink, width, height), note)


def _path_row(scene: TokenScene, index: int, hues: dict[int, int], ink: Ink, width: int) -> Row:
    trace = scene.trace
    assert trace is not None
    here = index == scene.layer
    row = Line(ink, width).put(
        f"L{trace.layers[index]} ", "strong" if here else "muted", 5, align="right", bold=here
    )
    row.put("▸" if here else " ", "strong")
    experts, weights = trace.experts_LSK[index, scene.token], trace.weights_LSK[index, scene.token]
    digits = len(str(max(int(trace.experts_LSK.max()), 0)))
    for expert, weight in zip(experts.tolist(), weights.tolist(), strict=True):
        if expert < 0 or row.room < digits + 4:
            break
        style: str | Style = "strong" if here else "text"
        if here and expert in hues:
            style = hue_style(ink, hues[expert])
        row.put(f"{expert:>{digits}}", style).put(f" {quantities.unit(weight)} ", "muted").put(" ")
    return row.row()


def shared_LS(scene: TokenScene) -> np.ndarray:
    """Share of the experts of the token under the cursor that each token uses too, per layer: overlap of the top k."""
    assert scene.trace is not None
    experts_LSK = scene.trace.experts_LSK
    own_LK = experts_LSK[:, scene.token]
    hits_LSK = (experts_LSK[..., None] == own_LK[:, None, None, :]).any(axis=-1) & (experts_LSK >= 0)
    return hits_LSK.sum(axis=-1) / np.maximum((own_LK >= 0).sum(axis=-1), 1)[:, None]


def draw_shared(scene: TokenScene, ink: Ink, width: int, height: int) -> Panel:
    """Layers x tokens: how many experts each token shares with the one under the cursor."""
    trace = scene.trace
    title = "experts shared with the token under the cursor"
    if trace is None:
        return Panel(title, message_rows("", ink, width, height))
    margin = len(str(max(trace.layers))) + 1
    room = max(width - margin, 1)
    count = len(trace.texts)
    start = min(max(scene.token - room // 2, 0), max(count - room, 0))
    shown = min(count - start, room)
    grid = fit(len(trace.layers), shown, room, height - 1, cursor=scene.layer, marks=ink.marks)
    rows = []
    for line, row in enumerate(_shared_cells(scene, start, shown, grid, ink)):
        upper = grid.row_at(line)
        here = upper is not None and grid.line_of(scene.layer) == line
        label = (
            ""
            if upper is None or grid.line_of(upper) != line
            else trace.layers[scene.layer if here else upper]
        )
        built = Line(ink, width).put(
            f"{label} ", "strong" if here else "faint", margin, align="right", bold=here
        )
        rows.append(built.extend(row).row())
    at = margin + (scene.token - start) * grid.cell_width
    foot = Line(ink, width).to(at).put("▴", "strong").put(f" token {scene.token}", "faint").row()
    return Panel(title, [*filled(rows, ink, width, height - 1), foot], "strongest colour: all of them")


def _shared_cells(scene: TokenScene, start: int, shown: int, grid: Grid, ink: Ink) -> list[Row]:
    ramp = ink.sequential
    values = shared_LS(scene)[grid.first_row : grid.first_row + grid.num_rows, start : start + shown]
    levels = np.rint(values * ramp.top).astype(np.int64)
    if ink.marks:
        marks = [
            ["#" if value == 1 else "." if value == 0 else str(int(value * 10)) for value in row]
            for row in values
        ]
        return mark_lines(marks, levels, ramp, ink, grid)
    return (
        half_lines(levels, ramp, grid.cell_width)
        if grid.style == "half"
        else full_lines(levels, ramp, ink, grid)
    )
