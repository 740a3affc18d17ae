"""One layer: a bar per expert, around the even share or from nothing up."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from rich.segment import Segment
from rich.style import Style

from moeviz.colors import LOAD_LIMIT, LOAD_TICKS, load_level
from tui import quantities
from tui.ink import LEVELS, SPARKS, Ink
from tui.lines import Line, Panel, Row, filled
from tui.scene import Scene, coverage, noise_log2_L

_AXIS = 6
_MAX_BAR = 9


def bar_order(scene: Scene) -> np.ndarray:
    """Experts of the layer in the order of their bars: by falling load (stable), or by number."""
    loads_E = shown_loads(scene)
    if scene.eye.by_id:
        return np.arange(len(loads_E))
    return np.argsort(-np.nan_to_num(loads_E, nan=-1.0), kind="stable")


def shown_loads(scene: Scene) -> np.ndarray:
    """Relative loads of the layer's experts, of this step or on average, as the scale says."""
    source = scene.snapshot.load_rel_ema_LE if scene.scale == "mean" else scene.snapshot.load_rel_LE
    return source[scene.layer, : scene.num_experts]


class _Bars(NamedTuple):
    """What the bars of a layer are drawn from."""

    experts: np.ndarray
    """Expert of each bar."""
    loads: np.ndarray
    levels: np.ndarray
    """Level of each bar in the load ramp, -1 for a load of 0."""
    cell: int
    """Columns per bar, the gap between bars included."""
    cursor: int
    """Bar under the cursor, -1 if none."""
    noise: float

    def color(self, index: int, ink: Ink, even: str = "") -> str:
        """Colour of a bar: its level, the cursor's for the chosen one, `even` where the level is the midpoint."""
        if index == self.cursor:
            return ink.color_of("cursor")
        level = max(int(self.levels[index]), 0)
        return even if even and level == ink.load.top // 2 else ink.load.colors[level]


def draw_layer_bars(scene: Scene, ink: Ink, width: int, height: int) -> Panel:
    """Log2 bars up and down from 1x with the band that noise fills; shares from 0 with the even share as a line."""
    order = bar_order(scene)
    pool = -(-len(order) // max(width - _AXIS, 1))
    bars = _bars(scene, order, pool, width)
    draw = _share_lines if scene.scale == "share" else _log_lines
    rows = draw(scene, bars, ink, width, max(height - 2, 4))
    rows = [
        *filled(rows, ink, width, height - 2),
        _names(bars, ink, width),
        _reading(scene, bars, ink, width),
    ]
    info = scene.snapshot.info.layers[scene.layer]
    kind = {"share": "share of tokens", "mean": "load, mean of 20 steps"}.get(
        scene.scale, "load of this step"
    )
    title = f"layer {scene.layer} · {kind} · {'by number' if scene.eye.by_id else 'by load'}"
    note = f"{info.num_experts} experts, {info.top_k} a token · {info.name}"
    if pool > 1:
        note = f"every {pool}th expert · {note}"

    def spot(x: int, _y: int) -> tuple[int, int] | None:
        index = (x - _AXIS) // bars.cell
        return (scene.layer, int(bars.experts[index])) if x >= _AXIS and index < len(bars.experts) else None

    return Panel(title, rows, note, spot)


def _bars(scene: Scene, order: np.ndarray, pool: int, width: int) -> _Bars:
    experts = order[::pool]
    loads = shown_loads(scene)[experts]
    noise = float(noise_log2_L(scene.snapshot)[scene.layer])
    cursor = int(np.flatnonzero(order == scene.expert)[0]) // pool if scene.expert in order else -1
    cell = min(max((width - _AXIS) // len(experts), 1), _MAX_BAR)
    return _Bars(experts, loads, load_level(loads, noise, LEVELS), cell, cursor, noise)


def _log_lines(scene: Scene, bars: _Bars, ink: Ink, width: int, lines: int) -> list[Row]:
    """Bars of log2 load around the 1x line, ends at 1/8 and 8x; a dead expert is a cross at the lower end."""
    half = max((lines - 1) // 2, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(bars.loads > 0, np.clip(np.log2(bars.loads), -LOAD_LIMIT, LOAD_LIMIT), 0.0)
    eighths = np.rint(np.nan_to_num(logs) / LOAD_LIMIT * half * 8).astype(int).tolist()
    dead = (bars.levels < 0).tolist()
    colors = [bars.color(index, ink) for index in range(len(eighths))]
    ticks = {half - round(value / LOAD_LIMIT * half): label for value, label in LOAD_TICKS}
    rows = []
    for line in range(2 * half + 1):
        built = _axis_label(ticks.get(line, ""), "muted" if line == half else "faint", ink, width)
        if line == half:
            rows.append(built.put("─" * bars.cell * len(bars.loads), "faint", on="band").row())
            continue
        up = line < half
        base = (half - 1 - line) * 8 if up else (line - half - 1) * 8
        back = ink.color_of("band") if base / 8 / half * LOAD_LIMIT < bars.noise else ink.background
        for index, eighth in enumerate(eighths):
            fill = min(max((eighth if up else -eighth) - base, 0), 8)
            if dead[index] and line == 2 * half:
                built.put("×", "strong", bars.cell - (bars.cell >= 3), align="center").put(
                    "", width=int(bars.cell >= 3)
                )
            else:
                built.extend(_bar_cell(fill, up, colors[index], back, bars.cell, ink.ascii))
        rows.append(built.row())
    return rows


def _axis_label(text: str, style: str, ink: Ink, width: int) -> Line:
    return Line(ink, width).put(text, style, _AXIS - 1, align="right").put(" ")


@cache
def _bar_cell(fill: int, up: bool, color: str, back: str, cell: int, ascii: bool) -> tuple[Segment, ...]:
    """One line of a bar: `fill` eighths of it, from below (up) or from above (down), and the gap to the next bar."""
    gap = 1 if cell >= 3 else 0
    if ascii:
        drawn = Segment(("#" if fill >= 4 else " ") * (cell - gap), Style(color=color, bgcolor=back))
    elif up or fill in (0, 8):
        drawn = Segment(SPARKS[fill] * (cell - gap), Style(color=color, bgcolor=back))
    else:  # what hangs from above is what a block from below leaves free
        drawn = Segment(SPARKS[8 - fill] * (cell - gap), Style(color=back, bgcolor=color))
    return (drawn, Segment(" " * gap, Style(bgcolor=back))) if gap else (drawn,)


def _share_lines(scene: Scene, bars: _Bars, ink: Ink, width: int, lines: int) -> list[Row]:
    """Bars of the share of tokens from 0 up; the even share K/E is a line behind them."""
    info = scene.snapshot.info.layers[scene.layer]
    even = info.top_k / info.num_experts
    shares = np.nan_to_num(bars.loads * even)
    top = min(max(float(shares.max(initial=0.0)), 2 * even), 1.0)
    eighths = np.rint(shares / top * lines * 8).astype(int).tolist()
    even_line = lines - 1 - min(int(even / top * lines), lines - 1)
    labels = {0: quantities.percent(top), lines - 1: "0 %", even_line: quantities.percent(even)}
    colors = [bars.color(index, ink, even=ink.color_of("faint")) for index in range(len(eighths))]
    rows = []
    for line in range(lines):
        base = (lines - 1 - line) * 8
        built = _axis_label(labels.get(line, ""), "muted" if line == even_line else "faint", ink, width)
        for index, eighth in enumerate(eighths):
            fill = min(max(eighth - base, 0), 8)
            if fill == 0 and line == even_line:
                built.put("─" * bars.cell, "faint")
            else:
                built.extend(_bar_cell(fill, True, colors[index], ink.background, bars.cell, ink.ascii))
        rows.append(built.row())
    return rows


def _names(bars: _Bars, ink: Ink, width: int) -> Row:
    line = Line(ink, width).put("", width=_AXIS)
    if bars.cell >= 4:
        for index, expert in enumerate(bars.experts.tolist()):
            here = index == bars.cursor
            line.put(
                str(expert), "strong" if here else "faint", bars.cell - 1, align="center", bold=here
            ).put(" ")
        return line.row()
    at = _AXIS + bars.cursor * bars.cell + (bars.cell - 1) // 2
    return line.to(at).put("▴", "strong").row() if bars.cursor >= 0 else line.row()


def _reading(scene: Scene, bars: _Bars, ink: Ink, width: int) -> Row:
    load_rel = scene.load_rel
    line = Line(ink, width).put(f"L{scene.layer} E{scene.expert}", "strong", bold=True).put("  ")
    if not np.isnan(load_rel):
        line.put(quantities.ratio(load_rel), "strong", 6, align="right")
        line.put(f"  {quantities.percent(coverage(scene.snapshot, scene.layer, load_rel))} of tokens", "text")
    words = f"{quantities.ratio(2**-bars.noise)} to {quantities.ratio(2**bars.noise)} is noise"
    if line.room > len(words) + 3:
        line.to(width - len(words) - 2).put("  ", on="band").put(words, "faint")
    return line.row()
