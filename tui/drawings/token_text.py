"""A sequence as text, each token in the colour of its expert; and the path of one token through all layers.

Sixty-four hues cannot be told apart: the seven busiest experts of the layer get one each, the chosen expert is
orange, the rest is grey, and the number of the expert under the cursor is always printed. Token text is untrusted:
what could steer a terminal is replaced before it is drawn.
"""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from rich.cells import cell_len
from rich.style import Style

from moeviz.colors import EXPERT_HUES, hex_to_rgb, rgb_to_hex
from tui import quantities
from tui.archive import TokenTrace
from tui.ink import Ink
from tui.lines import Line, Panel, Row, filled, message_rows

NUM_HUES = 7
_OTHER = 7
_ORANGE = 0


@dataclass(frozen=True, eq=False)
class TokenScene:
    """What the Tokens screen shows. `layer` and `token` are positions on the axes L and S of the trace."""

    trace: TokenTrace | None
    layer: int = 0
    token: int = 0
    only: int | None = None
    """Show this expert alone."""
    position: int = 0
    """Which of `total` sequences."""
    total: int = 0
    message: str = ""
    """What to say while there is no trace."""

    @property
    def key(self) -> object:
        ref = None if self.trace is None else self.trace.ref
        return (ref, self.layer, self.token, self.only, self.position, self.total, self.message)

    @property
    def top_experts_S(self) -> np.ndarray:
        """First expert of every token at the layer."""
        assert self.trace is not None
        return self.trace.experts_LSK[self.layer, :, 0]


class Piece(NamedTuple):
    """A stretch of a line that belongs to one token."""

    token: int
    text: str


def printable(text: str) -> str:
    """Token text that cannot steer a terminal: control, format, bidirectional and unassigned characters
    become marks.
    """
    shown = []
    for char in text:
        if char == "\n":
            shown.append("⏎")
        elif char == "\t":
            shown.append("→")
        elif (
            ord(char) < 32
            or ord(char) == 127
            or (char != " " and unicodedata.category(char)[0] in "CZ")
            or cell_len(char) == 0
        ):
            shown.append("·")
        else:
            shown.append(char)
    return "".join(shown)


def layout(texts: tuple[str, ...], width: int) -> list[list[Piece]]:
    """Tokens into lines of at most `width` cells; a newline in a token ends its line, after its mark."""
    lines: list[list[Piece]] = [[]]
    used = 0
    for token, text in enumerate(texts):
        shown = printable(text) or "·"
        cells = cell_len(shown)
        if used + cells > width and used:
            lines.append([])
            used = 0
        while cells > width:
            cut = next(n for n in range(len(shown), 0, -1) if cell_len(shown[:n]) <= max(width, 2))
            lines[-1].append(Piece(token, shown[:cut]))
            lines.append([])
            shown = shown[cut:]
            cells, used = cell_len(shown), 0
        if shown:
            lines[-1].append(Piece(token, shown))
            used += cells
        if "\n" in text:
            lines.append([])
            used = 0
    return lines if lines[-1] else lines[:-1]


def hues_of(scene: TokenScene) -> dict[int, int]:
    """Expert -> hue for the busiest experts of the layer; the chosen one alone when there is one."""
    if scene.only is not None:
        return {scene.only: _ORANGE}
    experts, counts = np.unique(scene.top_experts_S, return_counts=True)
    order = np.lexsort((experts, -counts))[:NUM_HUES]
    return {int(experts[at]): rank for rank, at in enumerate(order) if experts[at] >= 0}


def draw_token_text(scene: TokenScene, ink: Ink, width: int, height: int) -> Panel:
    """The text around the cursor, and under it which hue is which expert."""
    trace = scene.trace
    if trace is None:
        return Panel("tokens", message_rows(scene.message, ink, width, height))
    lines = layout(trace.texts, width)
    here = next((at for at, line in enumerate(lines) if any(piece.token == scene.token for piece in line)), 0)
    hues = hues_of(scene)
    legend = _legend(scene, hues, ink, width)[: max(height // 3, 1)]
    room = max(height - len(legend) - 1, 1)
    first = min(max(here - room // 2, 0), max(len(lines) - room, 0))
    styles = _styles(scene, hues, ink)
    rows = [_text_row(line, styles, scene, ink, width) for line in lines[first : first + room]]
    rows = [*filled(rows, ink, width, height - len(legend)), *legend]

    def spot(x: int, y: int) -> tuple[int, int] | None:
        if not 0 <= y < min(room, len(lines) - first):
            return None
        for piece in lines[first + y]:
            x -= cell_len(piece.text)
            if x < 0:
                return (scene.layer, piece.token)
        return None

    ref = trace.ref
    title = f"layer {trace.layers[scene.layer]} · sequence {scene.position + 1} of {scene.total}"
    title += f" · step {quantities.count(ref.step)}"
    if ref.domain:
        title += f" · {ref.domain}"
    note = f"{ref.num_tokens} tokens"
    if math.isfinite(ref.mean_loss):
        note += f" · loss {ref.mean_loss:.2f}"
    if len(lines) > room:
        note += f" · lines {first + 1} to {min(first + room, len(lines))} of {len(lines)}"
    return Panel(title, rows, note, spot)


def _styles(scene: TokenScene, hues: dict[int, int], ink: Ink) -> list[Style]:
    """Style of every token: strong for a first choice, weak where the chosen expert is a later one."""
    assert scene.trace is not None
    slots_SK = scene.trace.experts_LSK[scene.layer]
    styles = []
    for experts in slots_SK.tolist():
        if scene.only is not None and experts[0] != scene.only and scene.only in experts:
            styles.append(hue_style(ink, _ORANGE, weak=True))
        else:
            styles.append(hue_style(ink, hues.get(experts[0], _OTHER)))
    return styles


def hue_style(ink: Ink, hue: int, *, weak: bool = False) -> Style:
    """A token's style: the hue mixed into the page behind, readable text in front."""
    return _hue_style(
        EXPERT_HUES[hue] if hue != _OTHER else "",
        ink.background,
        ink.color_of("text"),
        ink.color_of("strong"),
        weak,
        ink.color,
    )


@cache
def _hue_style(hue: str, page: str, text: str, strong: str, weak: bool, color: bool) -> Style:
    if not hue:
        return Style(color=text, bgcolor=page)
    share = 0.22 if weak else 0.5
    mixed = [
        round(share * a + (1 - share) * b) for a, b in zip(hex_to_rgb(hue), hex_to_rgb(page), strict=True)
    ]
    return Style(color=strong, bgcolor=rgb_to_hex(np.array(mixed)), underline=None if color else not weak)


def _text_row(line: list[Piece], styles: list[Style], scene: TokenScene, ink: Ink, width: int) -> Row:
    cursor = ink.load.cell(ink.load.cursor)
    row = Line(ink, width)
    for piece in line:
        row.put(piece.text, cursor if piece.token == scene.token else styles[piece.token])
    return row.row()


def _legend(scene: TokenScene, hues: dict[int, int], ink: Ink, width: int) -> list[Row]:
    """Which hue is which expert, on as many lines as it takes."""
    tops = scene.top_experts_S
    lines = [Line(ink, width)]
    for expert, hue in hues.items():
        share = float((tops == expert).mean()) if len(tops) else 0.0
        words, aside = f" E{expert} ", f" {quantities.percent(share)}  "
        if lines[-1].room < len(words) + len(aside):
            lines.append(Line(ink, width))
        lines[-1].put(words, hue_style(ink, hue)).put(aside, "muted")
    if scene.only is not None:
        assert scene.trace is not None
        any_slot = float((scene.trace.experts_LSK[scene.layer] == scene.only).any(axis=1).mean())
        lines[-1].put(f"first choice, {quantities.percent(any_slot)} among all choices", "muted")
    elif lines[-1].room > 6:
        lines[-1].put("others", "faint")
    return [line.row() for line in lines]
