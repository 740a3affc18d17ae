"""A matrix as terminal cells: two rows a line in half blocks, or whole lines where there is room.

Everything works on small integers: values become levels of a ramp, levels become runs, runs become segments. A
48 x 64 map is 24 lines of a few segments each, and no style is built twice.

Pooling keeps what matters: the value with the largest deviation stands for its group, never the mean, which would
hide a hot expert beside a dead one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from rich.segment import Segment
from rich.style import Style

from tui.ink import Ink, Ramp
from tui.lines import Line, Row

MAX_CELL_WIDTH = 9
MAX_CELL_HEIGHT = 3
TEXT_WIDTH = 6
"""From this cell width on a cell prints its value."""
_BOLD, _NORMAL = Style(bold=True), Style()


@dataclass(frozen=True)
class Grid:
    """How a matrix fills a rectangle."""

    style: Literal["half", "full"]
    num_rows: int
    """Rows of the matrix that are shown."""
    first_row: int
    """First of them: the rest is scrolled away."""
    num_cells: int
    """Cells per row, after pooling."""
    pool: int
    """Columns of the matrix per cell."""
    cell_width: int
    cell_height: int
    """Lines per matrix row in the `full` style."""

    @property
    def lines(self) -> int:
        return (self.num_rows + 1) // 2 if self.style == "half" else self.num_rows * self.cell_height

    @property
    def width(self) -> int:
        return self.num_cells * self.cell_width

    def row_at(self, line: int, lower: bool = False) -> int | None:
        """Matrix row drawn on `line`, in the half style its upper or lower one; None past the end."""
        row = line * 2 + lower if self.style == "half" else line // self.cell_height
        return self.first_row + row if 0 <= row < self.num_rows else None

    def line_of(self, row: int) -> int:
        """The line on which a label of matrix row `row` belongs."""
        row -= self.first_row
        return row // 2 if self.style == "half" else row * self.cell_height + (self.cell_height - 1) // 2

    def column_at(self, x: int) -> int | None:
        """First matrix column of the cell at `x`."""
        cell = x // self.cell_width
        return cell * self.pool if 0 <= cell < self.num_cells else None


def fit(
    num_rows: int, num_columns: int, width: int, height: int, *, cursor: int = 0, marks: bool = False
) -> Grid:
    """Choose the largest cells that show the whole matrix; pool columns and scroll rows only when they must.

    Args:
        num_rows, num_columns: shape of the matrix.
        width, height: cells and lines there are.
        cursor: row that has to be visible.
        marks: glyph cells, which cannot share a line.
    """
    width, height = max(width, 1), max(height, 1)
    pool = -(-max(num_columns, 1) // width)
    num_cells = -(-num_columns // pool)
    cell_width = min(max(width // max(num_cells, 1), 1), MAX_CELL_WIDTH)
    half = not marks and num_rows > height
    capacity = height * 2 if half else height
    shown = min(num_rows, capacity)
    first = min(max(cursor - shown // 2, 0), num_rows - shown)
    if half:
        first -= first % 2
        if cursor >= first + capacity:
            first += 2
        shown = min(num_rows - first, capacity)
    tall = min(max(height // max(shown, 1), 1), MAX_CELL_HEIGHT, max(cell_width // 2, 1))
    return Grid("half" if half else "full", shown, first, num_cells, pool, cell_width, 1 if half else tall)


def pool_extreme(values_RC: np.ndarray, factor: int, center: float = 0.0) -> np.ndarray:
    """Per group of `factor` columns the value farthest from `center`; NaN only where a whole group is NaN.

    Returns [R, ceil(C / factor)].
    """
    if factor <= 1:
        return values_RC
    num_rows, num_columns = values_RC.shape
    pad = -num_columns % factor
    padded = np.pad(values_RC.astype(np.float64), ((0, 0), (0, pad)), constant_values=np.nan)
    groups = padded.reshape(num_rows, -1, factor)
    distance = np.where(np.isnan(groups), -1.0, np.abs(groups - center))
    pick = distance.argmax(axis=2)
    return np.take_along_axis(groups, pick[..., None], axis=2)[..., 0]


def half_lines(levels_RC: np.ndarray, ramp: Ramp, cell_width: int = 1) -> list[Row]:
    """Two matrix rows a line: upper half blocks in the colour of one over the colour of the other.

    A dead cell is a small cross in its half of the line, over the colour of the other half.
    """
    levels_RC = levels_RC.astype(np.int64)
    if len(levels_RC) % 2:
        levels_RC = np.vstack([levels_RC, np.full((1, levels_RC.shape[1]), ramp.blank)])
    rows = []
    for top, bottom in zip(levels_RC[0::2], levels_RC[1::2], strict=True):
        runs, above, below = _runs(top * 4096 + bottom), top.tolist(), bottom.tolist()
        rows.append([ramp.halves(above[at], below[at], (to - at) * cell_width) for at, to in runs])
    return rows


def full_lines(
    levels_RC: np.ndarray,
    ramp: Ramp,
    ink: Ink,
    grid: Grid,
    texts: list[list[str]] | None = None,
    cursor: tuple[int, int] | None = None,
) -> list[Row]:
    """One matrix row on `grid.cell_height` lines; `texts` stand in the cells of the middle line.

    A cell with text keeps its colour under the `cursor` (row, column) and gets a bright frame instead.
    """
    rows: list[Row] = []
    for index, levels in enumerate(levels_RC.astype(np.int64)):
        at_middle = [line == (grid.cell_height - 1) // 2 for line in range(grid.cell_height)]
        if texts is None or grid.cell_width < TEXT_WIDTH:
            rows += [
                [
                    _full_segment(int(levels[start]), stop - start, grid.cell_width, ramp, here)
                    for start, stop in _runs(levels)
                ]
                for here in at_middle
            ]
            continue
        chosen = cursor[1] if cursor is not None and cursor[0] == index else -1
        middle = _tiles(levels.tolist(), texts[index], chosen, ramp, ink, grid.cell_width)
        plain = _tiles(levels.tolist(), [""] * len(levels), chosen, ramp, ink, grid.cell_width)
        rows += [middle if here else plain for here in at_middle]
    return rows


def _tiles(levels: list[int], texts: list[str], chosen: int, ramp: Ramp, ink: Ink, cell_width: int) -> Row:
    """Cells with a blank column between them, where the frame of the chosen one stands."""
    row: Row = []
    frame = ink.style("cursor")
    for column, (level, text) in enumerate(zip(levels, texts, strict=True)):
        style = ramp.cell(level) + (_BOLD if column == chosen else _NORMAL)
        row.append(Segment(ink.say(text[: cell_width - 1].center(cell_width - 1)), style))
        edge = "▌" if column == chosen else "▐" if column + 1 == chosen else " "
        row.append(Segment(edge, frame))
    return row


def _full_segment(level: int, cells: int, cell_width: int, ramp: Ramp, at_middle: bool) -> Segment:
    mark = "×" if level == ramp.dead and at_middle else ""
    return Segment(mark.center(cell_width) * cells, ramp.cell(level))


def mark_lines(
    marks_RC: list[list[str]], levels_RC: np.ndarray, ramp: Ramp, ink: Ink, grid: Grid
) -> list[Row]:
    """One matrix row a line, a glyph a cell; the cell under the cursor is drawn reversed."""
    rows: list[Row] = []
    middle = (grid.cell_height - 1) // 2
    empty = [Segment(" " * grid.width, ink.style("text"))]
    for marks, levels in zip(marks_RC, levels_RC.tolist(), strict=True):
        row: Row = []
        for mark, level in zip(marks, levels, strict=True):
            style = ramp.cell(level) if level == ramp.cursor else ink.style("text")
            row.append(Segment(ink.say(mark.center(grid.cell_width)[: grid.cell_width]), style))
        rows += [row if line == middle else empty for line in range(grid.cell_height)]
    return rows


def ruler(ink: Ink, grid: Grid, margin: int, width: int, cursor: int) -> Line:
    """Column numbers over their cells, and a mark over the cursor's column; `margin` cells lie before the first."""
    marks = [" "] * grid.width
    least = -(-5 // grid.cell_width)
    stride = next(stride for stride in (1, 2, 4, 8, 16, 32, 64, 128) if stride >= least)
    for cell in range(0, grid.num_cells, stride):
        label = str(cell * grid.pool)
        at = cell * grid.cell_width
        if grid.cell_width > 4:
            at += (grid.cell_width - 1 - len(label)) // 2
        if at + len(label) <= len(marks):
            marks[at : at + len(label)] = label
    text = "".join(marks)
    here = cursor // grid.pool * grid.cell_width + (grid.cell_width - 1) // 2
    return (
        Line(ink, width)
        .put("", width=margin)
        .put(text[:here], "faint")
        .put("▾", "strong")
        .put(text[here + 1 :], "faint")
    )


def _runs(keys_C: np.ndarray) -> list[tuple[int, int]]:
    """Stretches of equal values: (start, stop) each."""
    edges = np.flatnonzero(keys_C[1:] != keys_C[:-1]) + 1
    return list(pairwise([0, *edges.tolist(), len(keys_C)]))
