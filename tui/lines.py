"""One row of a drawing, built from left to right and never wider than it may be.

Rows are plain lists of Rich segments: a Textual strip, a printed line and a test all read the same thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from textwrap import wrap
from typing import Literal, NamedTuple

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style

from tui.ink import SPARKS, TICKS, Ink

Row = list[Segment]
Spot = Callable[[int, int], tuple[int, int] | None]
"""Where a click lands: (x, y) inside the panel -> (row, column) of what is drawn there, or None."""


class Panel(NamedTuple):
    """A drawing: the rows inside a frame, the words on the frame, and what a click hits."""

    title: str
    rows: list[Row]
    note: str = ""
    spot: Spot | None = None


class Line:
    """A row under construction: `Line(ink, 40).put("loss", "muted", 12).put("3.117", align="right", width=9).row()`."""

    def __init__(self, ink: Ink, width: int) -> None:
        self.ink = ink
        self.width = max(width, 0)
        self.used = 0
        self._segments: Row = []

    @property
    def room(self) -> int:
        return self.width - self.used

    def put(
        self,
        text: str,
        style: str | Style = "text",
        width: int | None = None,
        *,
        align: Literal["left", "right", "center"] = "left",
        bold: bool = False,
        on: str | None = None,
    ) -> Line:
        """Append text, padded or cut to `width` cells if given, and to the room that is left in any case."""
        text = self.ink.say(text)
        cells = min(cell_len(text) if width is None else width, self.room)
        if cells <= 0:
            return self
        if isinstance(style, str):
            style = self.ink.style(style, bold=bold, on=on)
        self._segments.append(Segment(_fitted(text, cells, align, self.ink), style))
        self.used += cells
        return self

    def extend(self, segments: Iterable[Segment]) -> Line:
        """Append finished segments, cut to the room that is left."""
        segments = list(segments)
        needed = sum(cell_len(segment.text) for segment in segments)
        if needed <= self.room:
            self._segments += segments
            self.used += needed
            return self
        for text, style, _ in segments:
            cells = min(cell_len(text), self.room)
            if cells > 0:
                self._segments.append(Segment(set_cell_size(text, cells), style))
                self.used += cells
        return self

    def to(self, column: int, *, on: str | None = None) -> Line:
        """Fill with blanks up to `column`."""
        return self.put("", "text", column - self.used, on=on) if column > self.used else self

    def row(self, *, on: str | None = None) -> Row:
        """The finished row, filled with blanks to its width."""
        self.to(self.width, on=on)
        return self._segments


def _fitted(text: str, cells: int, align: str, ink: Ink) -> str:
    length = cell_len(text)
    if length > cells:
        return set_cell_size(text, cells - 1) + ink.say("…") if cells > 1 else set_cell_size(text, cells)
    pad = cells - length
    left = pad if align == "right" else pad // 2 if align == "center" else 0
    return " " * left + text + " " * (pad - left)


def text_of(rows: Sequence[Row]) -> str:
    """What a person reads, without styles: rows joined by newlines, blanks at the right removed."""
    return "\n".join("".join(segment.text for segment in row).rstrip() for row in rows)


def paragraph(text: str, ink: Ink, width: int, style: str = "text", indent: int = 0) -> list[Row]:
    """`text` wrapped to `width`, as rows."""
    lines = [piece for part in text.splitlines() for piece in (wrap(part, max(width - indent, 8)) or [""])]
    return [Line(ink, width).put(" " * indent).put(line, style).row() for line in lines]


def filled(rows: list[Row], ink: Ink, width: int, height: int) -> list[Row]:
    """`rows` cut or extended with blanks to exactly `height`."""
    blank = Line(ink, width).row()
    return rows[:height] + [blank] * (height - len(rows))


def message_rows(text: str, ink: Ink, width: int, height: int, style: str = "muted") -> list[Row]:
    """A few words in the middle of an otherwise empty panel."""
    column = min(max(width - 4, 8), 64)
    left = max((width - column) // 2, 0)
    body = [Line(ink, width).to(left).extend(row).row() for row in paragraph(text, ink, column, style)]
    blank = Line(ink, width).row()
    return filled([blank] * max((height - len(body)) // 2, 0) + body, ink, width, height)


Summary = Literal["mean", "min", "max"]


def resample(values: np.ndarray, width: int, keep: Summary = "mean") -> np.ndarray:
    """At most `width` values for the whole series; each stands for a stretch by its mean, or by its worst value."""
    values = np.asarray(values, dtype=np.float64)
    if width <= 0 or len(values) <= width:
        return values
    starts = np.arange(width) * len(values) // width
    if keep == "mean":
        known = ~np.isnan(values)
        with np.errstate(invalid="ignore"):
            return np.add.reduceat(np.where(known, values, 0.0), starts) / np.add.reduceat(
                known, starts, dtype=float
            )
    return (np.fmin if keep == "min" else np.fmax).reduceat(values, starts)


def chart(values: np.ndarray, low: float, high: float, width: int, height: int = 1) -> list[str]:
    """The last `width` values as columns of eighth blocks over a *fixed* range, `height` lines, newest at the right.

    Flat noise stays flat, because the range is not that of the data. A value on or below `low` keeps the lowest
    block, so that it is not mistaken for missing data; NaN is a gap.
    """
    values = np.asarray(values, dtype=np.float64)[-width:] if width > 0 else np.empty(0)
    span = high - low if high > low else 1.0
    with np.errstate(invalid="ignore"):
        eighths = np.clip(np.ceil((values - low) / span * 8 * height), 1, 8 * height)
    lines = []
    for line in range(height):
        base = (height - 1 - line) * 8
        cells = (" " if math.isnan(value) else SPARKS[int(min(max(value - base, 0), 8))] for value in eighths)
        lines.append("".join(cells).rjust(max(width, 0)))
    return lines


def sparkline(values: np.ndarray, low: float, high: float, width: int) -> str:
    """A `chart` of one line."""
    return chart(values, low, high, width)[0]


def bar(share: float, width: int) -> str:
    """A horizontal bar of `share` (0 to 1) of `width` cells, in eighths of a cell."""
    if not math.isfinite(share) or width <= 0:
        return " " * max(width, 0)
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (TICKS[rest - 1] if rest else "")).ljust(width)
