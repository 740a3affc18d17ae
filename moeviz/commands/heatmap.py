"""Loads of all layers as a picture in text, coloured by log2 of the relative load.

Without colour (a pipe, NO_COLOR) one layer a row in glyphs that carry the sign, because over- and underload
have the
same lightness: `x` dead, `-` below 1/2, `.` about even, `+` above 2, `#` above 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moeviz.colors import DEAD_MARK, LOAD_TICKS, load_level, load_ramp, rgb_to_hex

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_LABEL = 5
_SIDE = 40
_DEAD_STYLE = "bold #ffffff"
_ROOMY_LAYERS = 16
"""Up to here every layer has a line of its own, where a dead expert can carry its mark."""
_WIDEST_CELL = 4


def heatmap(
    layers: list[dict[str, Any]], top_k: dict[int, int], width: int = 100, color: bool = True
) -> RenderableType:
    """The picture with its legend.

    Args:
        layers: layer, tokens, load_rel (list), load_entropy, max_load, max_expert of each layer.
        top_k: experts per token of each layer.
        width: columns of the terminal.
        color: whether the terminal has colours.
    """
    from rich.console import Group
    from rich.text import Text

    most = max(len(layer["load_rel"]) for layer in layers)
    room = max(8, width - _LABEL - _SIDE)
    pool = -(-most // room)
    cell = min(_WIDEST_CELL, room // -(-most // pool))
    step = 2 if color and len(layers) > _ROOMY_LAYERS else 1
    rows = []
    for at in range(0, len(layers), step):
        group = layers[at : at + step]
        row = Text(f" {group[0]['layer']:>{_LABEL - 2}} ", style="dim")
        levels = [_levels(layer, top_k[layer["layer"]], pool) for layer in group]
        if not color:
            row.append(_glyphs(group[0], pool, cell))
        elif step == 1:
            row.append_text(_cells(levels[0], cell))
        else:
            row.append_text(_half_blocks(levels, cell))
        row.append(" " * (_LABEL + cell * -(-most // pool) - len(row)))
        row.append_text(_side(group))
        rows.append(row)
    return Group(*rows, _legend(pool, color))


def _cells(levels: list[int], cell: int) -> Text:
    """One layer on a line of its own."""
    from rich.text import Text

    ramp, line = load_ramp("dark"), Text()
    for level in levels:
        mark = DEAD_MARK.center(cell) if level == -1 else " " * cell
        line.append(mark, f"{_DEAD_STYLE} on {rgb_to_hex(ramp[max(level, 0)])}")
    return line


def _half_blocks(levels: list[list[int]], cell: int) -> Text:
    """Two layers on one line: the upper in the upper half of each cell."""
    from rich.text import Text

    ramp, line = load_ramp("dark"), Text()
    for at in range(max(len(level) for level in levels)):
        pair = [level[at] if at < len(level) else None for level in levels]
        colors = [None if one is None else rgb_to_hex(ramp[max(one, 0)]) for one in pair]
        if pair == [-1, -1]:
            line.append(DEAD_MARK.center(cell), f"{_DEAD_STYLE} on {colors[0]}")
        elif colors[0] is None:
            line.append("▄" * cell, colors[1] or "")
        else:
            below = f" on {colors[1]}" if len(colors) > 1 and colors[1] else ""
            line.append("▀" * cell, f"{colors[0]}{below}")
    return line


def _levels(layer: dict[str, Any], top_k: int, pool: int) -> list[int]:
    """Index into the colour ramp of each cell, -1 for a dead expert."""
    load_rel = np.asarray(layer["load_rel"])
    noise = 1.44 / np.sqrt(max(layer["tokens"] * top_k / len(load_rel), 1))
    return load_level(_pooled(load_rel, pool), noise_log2=max(0.25, noise)).tolist()


def _pooled(load_rel: np.ndarray, pool: int) -> np.ndarray:
    """One cell for `pool` experts: the one farthest from even, so a hot or dead one is never averaged away."""
    if pool == 1:
        return load_rel
    with np.errstate(divide="ignore"):
        far = np.abs(np.log2(load_rel))
    groups = range(0, len(load_rel), pool)
    return np.array([load_rel[at + int(far[at : at + pool].argmax())] for at in groups])


def _glyphs(layer: dict[str, Any], pool: int, cell: int) -> str:
    edges = ((0.0, "x"), (0.5, "-"), (2.0, "."), (4.0, "+"), (np.inf, "#"))
    loads = _pooled(np.asarray(layer["load_rel"]), pool)
    glyphs = (next(glyph for edge, glyph in edges if load <= edge) for load in loads)
    return "".join(glyph.ljust(min(cell, 2)) for glyph in glyphs)


def _side(group: list[dict[str, Any]]) -> Text:
    """Entropy of each layer of the line, the busiest expert among them, and how many experts are dead."""
    from rich.text import Text

    side = Text("  H ", style="dim")
    for layer in group:
        entropy = layer["load_entropy"]
        side.append(f"{entropy:.2f} ", "bold red" if entropy < 0.7 else "yellow" if entropy < 0.9 else "")
    hot = max(group, key=lambda layer: layer["max_load"])
    side.append(" max ", "dim")
    side.append(f"{hot['max_load']:.1f}×", "bold #ffbf80" if hot["max_load"] >= 4 else "")
    side.append(
        f" E{hot['max_expert']}" if len(group) == 1 else f" L{hot['layer']} E{hot['max_expert']}", "dim"
    )
    dead = sum(load == 0 for layer in group for load in layer["load_rel"])
    if dead:
        side.append(f"  {DEAD_MARK} {dead} dead", "bold #8ec9ff")
    return side


def _legend(pool: int, color: bool) -> Text:
    from rich.text import Text

    legend = Text(" " * _LABEL)
    if color:
        ramp = load_ramp("dark")
        for exponent, label in LOAD_TICKS:
            at = round((exponent + 3) / 6 * (len(ramp) - 1))
            legend.append("  ", f"on {rgb_to_hex(ramp[at])}")
            legend.append(f" {label}  ", "dim")
        legend.append(f" {DEAD_MARK} ", f"{_DEAD_STYLE} on {rgb_to_hex(ramp[0])}")
        legend.append(" dead", "dim")
    else:
        legend.append("x dead  - below 1/2  . even  + above 2  # above 4 times the even share")
    if pool > 1:
        legend.append(f"  · a cell is the farthest from even of {pool} experts", "dim")
    legend.append("\n" + " " * _LABEL + "H: entropy of the load / ln E, 1 is even", "dim")
    return legend
