"""Latents of a block: one sequence as tokens by numbers (or slots), each number over training, what it adds up to."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeviz.colors import LOAD_LIMIT, load_level
from tui import quantities
from tui.heat import MAX_CELL_WIDTH, Grid, fit, full_lines, half_lines, mark_lines, pool_extreme
from tui.ink import LEVELS, Ink, Ramp
from tui.latents import LatentScale, LatentSheet, LatentValue, LatentView
from tui.lines import Line, Panel, Row, chart, filled, message_rows, paragraph, resample

_TITLES = {
    "kv": "latents of keys and values · one row per token",
    "q": "latents of queries · one row per token",
    "read": "stage 1: what each slot reads · one row per token, columns sum to 1",
    "write": "stage 2: what each token reads of the slots · one row per token",
}
_PROFILES = {
    "kv": "spread of each number over training",
    "q": "spread of each number over training",
    "read": "focus of each slot over training · 1 − entropy of what it reads",
    "write": "mass of each slot over training",
}
_EVEN_NOISE_LOG2 = 0.05
"""Half width around an even share, in doublings, that is drawn as even."""
_LEAST_FOCUS = 0.1
"""End of the ramp for focus at least: below, it is hardly more than none."""
_LABEL = 13
_SPECTRUM_LINES = 5
_FLOOR = -3.0
"""Decades below the largest singular value at which the spectrum ends."""


def draw_latent_picture(view: LatentView, ink: Ink, width: int, height: int) -> Panel:
    """Rows are tokens in order; blue below 0 and orange above, or the weight from dark to bright."""
    sheet = view.sheet
    if sheet is None:
        return Panel("latents", message_rows(view.message, ink, width, height))
    rows, cols = sheet.grid_SC.shape
    room, lines = width - _LABEL, max(height - 2, 1)
    pool = -(-cols // max(room, 1))
    cells = -(-cols // pool)
    first = min(view.first_row, max(rows - lines, 0))
    shown = min(rows - first, lines)
    grid = Grid("full", shown, first, cells, pool, min(max(room // cells, 1), MAX_CELL_WIDTH), 1)
    values = sheet.grid_SC[first : first + shown]
    body = _cells(_levels(values, sheet.scale, _top(sheet.grid_SC, sheet.scale), rows, pool, ink), grid, ink)
    made = [_columns(ink, grid, width)]
    for at, row in enumerate(body):
        made.append(Line(ink, width).put(_name(sheet, first + at), "muted", _LABEL).extend(row).row())
    made = [*filled(made, ink, width, height - 1), _legend(sheet, ink, width)]
    heads = f" · head {sheet.heads[sheet.head]}" if sheet.heads else ""
    start, block = sheet.first, _block(sheet)
    last = min((first + shown) * block, sheet.length)
    note = f"tokens {start + first * block} to {start + last - 1} of {start + sheet.length}"
    return Panel(f"block {sheet.block}{heads} · {_TITLES[sheet.part]}", made, note)


def _block(sheet: LatentSheet) -> int:
    return max(1, -(-sheet.length // max(len(sheet.grid_SC), 1)))


def _name(sheet: LatentSheet, row: int) -> str:
    if row >= len(sheet.texts):
        return f"{sheet.first + row * _block(sheet)} "
    text = sheet.texts[row].replace("\n", "⏎")
    return f"{text.strip() or text.replace(' ', '·')}"[: _LABEL - 1]


def _top(values: np.ndarray, scale: LatentScale) -> float:
    """Value of the end of the ramp; of signed values a quantile, for a few large ones would grey out the rest."""
    if scale == "even":
        return 2.0**LOAD_LIMIT
    size = np.abs(values)
    top = float(np.quantile(size, 0.99)) if scale == "signed" else float(np.nanmax(size, initial=0.0))
    return top or 1.0


class _Levels(NamedTuple):
    levels_RC: np.ndarray
    marks: list[list[str]]
    ramp: Ramp


def _levels(
    values_RC: np.ndarray, scale: LatentScale, top: float, count: int, pool: int, ink: Ink
) -> _Levels:
    """Values as levels of a ramp and as glyphs, `pool` columns a cell; `count` even values sum to 1."""
    if scale == "even":
        ramp = ink.load
        with np.errstate(divide="ignore"):
            logs = np.maximum(np.log2(values_RC * count), -9.0)
        pooled = pool_extreme(logs, pool)
        levels = load_level(2.0**pooled, _EVEN_NOISE_LOG2, LEVELS).astype(np.int64)
        levels[pooled == -9.0] = ramp.dead
        levels[np.isnan(pooled)] = ramp.blank
        return _Levels(
            levels, [[_mark(log / LOAD_LIMIT, True) for log in row] for row in pooled.tolist()], ramp
        )
    signed, pooled = scale == "signed", pool_extreme(values_RC, pool)
    share = np.clip(pooled / top, -1 if signed else 0, 1)
    ramp = ink.load if signed else ink.sequential
    levels = np.rint(np.nan_to_num((share + 1) / 2 if signed else share) * (LEVELS - 1)).astype(np.int64)
    levels[np.isnan(pooled)] = ramp.blank
    return _Levels(levels, [[_mark(value, signed) for value in row] for row in share.tolist()], ramp)


def _cells(drawn: _Levels, grid: Grid, ink: Ink) -> list[Row]:
    if ink.marks:
        return mark_lines(drawn.marks, drawn.levels_RC, drawn.ramp, ink, grid)
    if grid.style == "half":
        return half_lines(drawn.levels_RC, drawn.ramp, grid.cell_width)
    return full_lines(drawn.levels_RC, drawn.ramp, ink, grid)


def _mark(share: float, signed: bool) -> str:
    if np.isnan(share):
        return " "
    if signed:
        return (
            "#"
            if share > 0.6
            else "+"
            if share > 0.2
            else "="
            if share < -0.6
            else "-"
            if share < -0.2
            else "."
        )
    return "#" if share > 0.6 else "+" if share > 0.3 else "-" if share > 0.1 else "."


def _columns(ink: Ink, grid: Grid, width: int) -> Row:
    """Numbers of the columns over their cells."""
    line, stride = Line(ink, width).put("", width=_LABEL), -(-5 // grid.cell_width)
    for cell in range(0, grid.num_cells, stride):
        label = str(cell * grid.pool)
        at = _LABEL + cell * grid.cell_width + max((grid.cell_width - len(label)) // 2, 0)
        if at + len(label) <= _LABEL + grid.width:
            line.to(at).put(label, "faint")
    return line.row()


def _legend(sheet: LatentSheet, ink: Ink, width: int) -> Row:
    line = Line(ink, width).put(f"{sheet.place} →".ljust(_LABEL), "faint")
    top = _top(sheet.grid_SC, sheet.scale)
    words = {
        "signed": (f"{-top:.2g} ", f" {top:.2g}", "= - . + # from below 0 to above"),
        "even": ("1/8 ", " 8× an even share", "= - . + # from less than an even share to more"),
        "weight": ("0 ", f" {top:.2g}", ". - + # from little to much"),
    }
    low, high, marks = words[sheet.scale]
    if ink.marks:
        return line.put(marks, "faint").row()
    ramp = ink.sequential if sheet.scale == "weight" else ink.load
    levels = np.rint(np.linspace(0, LEVELS - 1, 16)).astype(np.int64)[None]
    cells = full_lines(levels, ramp, ink, Grid("full", 1, 0, 16, 1, 1, 1))[0]
    return line.put(low, "faint").extend(cells).put(high, "faint").row()


def draw_latent_time(view: LatentView, ink: Ink, width: int, height: int) -> Panel:
    """A row per number of the latent or slot (or few of them), a column per recorded step, newest at the right."""
    sheet = view.sheet
    if sheet is None:
        return Panel("over training", message_rows("", ink, width, height))
    margin, lines = 4, max(height - 1, 1)
    scale: LatentScale = "even" if sheet.part == "write" else "weight"
    values_CT = 1 - sheet.profile_TC.T if sheet.part == "read" else sheet.profile_TC.T
    places = len(values_CT)
    values_CT = np.stack([resample(row, max(width - margin, 1)) for row in values_CT])
    together = -(-places // (lines if ink.marks else 2 * lines))
    values_CT = pool_extreme(values_CT.T, together, 1 / places if scale == "even" else 0.0).T
    grid = fit(len(values_CT), values_CT.shape[1], width - margin, lines, marks=ink.marks)
    top = max(_top(values_CT, scale), _LEAST_FOCUS if sheet.part == "read" else 0.0)
    body = _cells(_levels(values_CT, scale, top, places, grid.pool, ink), grid, ink)
    rows = []
    for at, row in enumerate(body):
        upper = grid.row_at(at)
        named = upper is not None and grid.line_of(upper) == at and at % 2 == 0
        label = str((upper or 0) * together) if named else ""
        rows.append(Line(ink, width).put(f"{label} ", "faint", margin, align="right").extend(row).row())
    rows = [*filled(rows, ink, width, lines), _steps(sheet, ink, width, margin, grid)]
    note = f"{together} a row, the largest shown · " if together > 1 else ""
    return Panel(
        _PROFILES[sheet.part],
        rows,
        note + ("1/8 to 8× even, which is not seen" if scale == "even" else f"0 to {top:.2g}"),
    )


def _steps(sheet: LatentSheet, ink: Ink, width: int, margin: int, grid: Grid) -> Row:
    first, last = quantities.count(sheet.steps_T[0]), quantities.count(sheet.steps_T[-1])
    axis = Line(ink, width).to(margin).put(f"step {first}", "faint")
    end = margin + grid.width - len(last)
    return (axis.to(end).put(last, "faint") if end > axis.used else axis).row()


def draw_latent_facts(view: LatentView, ink: Ink, width: int, height: int) -> Panel:
    """The numbers of the block, and its spectrum."""
    sheet = view.sheet
    if sheet is None:
        return Panel("numbers", message_rows("", ink, width, height))
    rows = [
        Line(ink, width)
        .put("block ", "muted")
        .put(str(sheet.block), "strong", bold=True)
        .put(f" of {', '.join(map(str, sheet.blocks))}", "muted")
        .row(),
        Line(ink, width)
        .put(f"step {quantities.count(sheet.step)} · {quantities.count(sheet.tokens)} tokens", "muted")
        .row(),
        Line(ink, width).row(),
    ]
    for value in sheet.values:
        rows.append(_value(value, sheet, ink, width))
        rows += paragraph(value.help, ink, width, "faint", 2)
    room = height - len(rows)
    if room > _SPECTRUM_LINES + 1:
        rows += [Line(ink, width).row(), *_spectrum(sheet, ink, width)]
    return Panel("numbers", filled(rows, ink, width, height))


def _value(value: LatentValue, sheet: LatentSheet, ink: Ink, width: int) -> Row:
    if value.unit.startswith("fraction"):
        shown = quantities.percent(value.value)
    else:
        shown = quantities.fixed(value.value, 1)
        if value.unit in ("dimensions", "slots"):
            shown += f" of {sheet.profile_TC.shape[1]}"
    return (
        Line(ink, width).put(value.name, "text").to(width - len(shown)).put(shown, "strong", bold=True).row()
    )


def _spectrum(sheet: LatentSheet, ink: Ink, width: int) -> list[Row]:
    """Singular values on a log axis, strongest at the left."""
    singular = sheet.singular_R[sheet.singular_R > 0]
    if not len(singular):
        return []
    decades = np.log10(np.maximum(singular / singular[0], 10**_FLOOR))
    columns = min(len(decades), width)
    shown = resample(decades, columns)
    wide = np.repeat(shown, max(1, width // columns))[:width]
    head = Line(ink, width).put(f"{len(singular)} directions, 1 to 1/1000", "muted").row()
    lines = chart(wide, _FLOOR, 0.0, len(wide), _SPECTRUM_LINES)
    return [head, *(Line(ink, width).put(line, "accent").row() for line in lines)]
