"""Colours and glyphs of the terminal: every style is built once, here, and looked up by name or by level.

The background of every cell is the midpoint of the load ramp, so an even load vanishes into the page. Without colour
(`NO_COLOR`) and with `ascii` a map cell carries its level as a glyph, because over- and underload of a ramp with a
dark midpoint look alike in grey.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import numpy as np
from rich.color import Color
from rich.segment import Segment
from rich.style import Style

from moeviz.colors import (
    EXPERT_HUES,
    LOAD_STOPS,
    SEQUENTIAL_STOPS,
    SEVERITY_COLORS,
    Theme,
    load_ramp,
    ramp,
    rgb_to_hex,
)

LEVELS = 33
"""Entries of a ramp on the terminal: few enough that neighbours merge into one segment, too many to tell apart."""
SPARKS = " ▁▂▃▄▅▆▇█"
TICKS = "▏▎▍▌▋▊▉█"

StyleName = Literal["text", "strong", "muted", "faint", "line", "accent", "good", "cursor", "band", "chosen"]

_PALETTE: dict[Theme, dict[str, str]] = {
    "dark": {
        "text": "#cfd4db",
        "strong": "#f2f4f7",
        "muted": "#8d949e",
        "faint": "#565d68",
        "line": "#2f343d",
        "accent": "#8fb3da",
        "good": "#7fbf8e",
        "cursor": "#ffffff",
        "band": "#23272e",
        "field": "#1e232b",
        "bar": "#1d2026",
    },
    "light": {
        "text": "#2b3036",
        "strong": "#0b0d10",
        "muted": "#666d76",
        "faint": "#a3a8af",
        "line": "#cdd1d6",
        "accent": "#2a5d94",
        "good": "#2c7a45",
        "cursor": "#000000",
        "band": "#e3e5e6",
        "field": "#e9ebeb",
        "bar": "#e7e8e7",
    },
}
_ASCII = str.maketrans(
    {
        **dict(zip("▁▂▃▄▅▆▇█", "..:-=+*#", strict=True)),
        **dict(zip("▏▎▍▌▋▊▉", "...-=++", strict=True)),
        **{
            "×": "x",
            "…": "~",
            "→": ">",
            "←": "<",
            "↑": "^",
            "↓": "v",
            "·": ".",
            "●": "*",
            "▲": "!",
            "■": "#",
        },
        **{
            "○": "o",
            "◐": "o",
            "✕": "X",
            "‖": "=",
            "─": "-",
            "━": "=",
            "│": "|",
            "▾": "v",
            "▴": "^",
            "▸": ">",
            "±": "~",
        },
        **{
            "╌": ".",
            "┈": ".",
            "┄": ".",
            "–": "-",
            "≥": ">",
            "≤": "<",
            "⏎": "$",
            "▶": ">",
            "τ": "t",
            "α": "a",
        },
        **{"✓": "v", "Δ": "d", "σ": "s", "π": "p", "\u2009": " ", "\u00a0": " ", "\u202f": " "},
    }
)


def luminance(color: str) -> float:
    """Relative luminance (WCAG 2) of `#rrggbb`, 0 to 1."""
    channels = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


class Ramp:
    """A colour table with its terminal styles, made lazily and kept.

    Past the table come three levels more, so that whatever a cell can be is one small integer: `cursor`, `blank`
    (no such cell: the page shows) and `dead` (exactly nothing arrived: a cross, never a colour of the ramp).
    """

    def __init__(self, table_N3: np.ndarray, cursor: str, page: str) -> None:
        size = len(table_N3)
        self.top = size - 1
        self.cursor, self.blank, self.dead = size, size + 1, size + 2
        self.colors = (*(rgb_to_hex(row) for row in table_N3), cursor, page, page)
        self._halves: dict[tuple[int, int, int], Segment] = {}
        self._cells: dict[int, Style] = {}

    def halves(self, top: int, bottom: int, cells: int) -> Segment:
        """`cells` half blocks: `top` is drawn, `bottom` is behind it. A dead half is a small cross over the other."""
        segment = self._halves.get((top, bottom, cells))
        if segment is None:
            if self.dead in (top, bottom):
                mark = "×" if top == bottom else "ˣ" if top == self.dead else "ₓ"
                segment = Segment(mark * cells, self.cell(bottom if top == self.dead else top))
            else:
                segment = Segment("▀" * cells, Style(color=self.colors[top], bgcolor=self.colors[bottom]))
            self._halves[top, bottom, cells] = segment
        return segment

    def cell(self, level: int) -> Style:
        """Style of a filled cell, its text in whichever of black and white reads better."""
        style = self._cells.get(level)
        if style is None:
            text = "#0c0e11" if luminance(self.colors[level]) > 0.18 else "#eceff3"
            style = Style(color=text, bgcolor=self.colors[level])
            self._cells[level] = style
        return style


@dataclass(frozen=True)
class Ink:
    """How to draw: theme, and whether glyphs must carry what colour cannot."""

    theme: Theme = "dark"
    ascii: bool = False
    """Only 7-bit glyphs."""
    color: bool = True
    """False under `NO_COLOR`: hues are not to be relied on."""

    @property
    def marks(self) -> bool:
        """Whether a map cell is a glyph (`x - . + #`) instead of a colour."""
        return self.ascii or not self.color

    @property
    def background(self) -> str:
        return LOAD_STOPS[self.theme][2]

    def color_of(self, name: str) -> str:
        """`#rrggbb` of a style name, of a severity, or `hue0` to `hue7`."""
        if name in SEVERITY_COLORS:
            return SEVERITY_COLORS[name]  # type: ignore[index]
        if name.startswith("hue"):
            return EXPERT_HUES[int(name[3:])]
        return _PALETTE[self.theme][name]

    def style(self, name: str, *, bold: bool = False, on: str | None = None) -> Style:
        """Style of a name (see `color_of`) on the page, or `on` another name's colour."""
        return _style(self.color_of(name), self.color_of(on) if on else self.background, bold)

    @cached_property
    def load(self) -> Ramp:
        """Diverging: load around the even share."""
        return Ramp(load_ramp(self.theme, LEVELS), self.color_of("cursor"), self.background)

    @cached_property
    def sequential(self) -> Ramp:
        """From (nearly) the page to the far end of viridis: counts, shares."""
        return self._sequential(backwards=False)

    @cached_property
    def evenness(self) -> Ramp:
        """The same backwards, for entropies: an even layer rests in the page, one that concentrates lights up."""
        return self._sequential(backwards=True)

    def _sequential(self, *, backwards: bool) -> Ramp:
        far = SEQUENTIAL_STOPS[1:] if self.theme == "dark" else SEQUENTIAL_STOPS[-2::-1]
        table = ramp((self.color_of("field"), *far), LEVELS)
        return Ramp(table[::-1] if backwards else table, self.color_of("cursor"), self.background)

    def say(self, text: str) -> str:
        """`text` in the glyphs this terminal can show, one cell for one cell."""
        return text.translate(_ASCII).encode("ascii", "replace").decode() if self.ascii else text


@cache
def _style(color: str, background: str, bold: bool) -> Style:
    return Style.from_color(Color.parse(color), Color.parse(background)) + Style(bold=bold or None)
