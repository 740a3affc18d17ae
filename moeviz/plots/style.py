"""What all figures share: ink and paper of the two themes, one template, one log2 load scale.

Paper is transparent, so a figure sits on whatever page shows it; the midpoint of the load table is the colour of the
dashboard's cards, so that an even load is nearly not there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from moeviz.colors import LOAD_LIMIT, LOAD_TICKS, Theme, load_ramp, plotly_scale, sequential_ramp


class Ink(NamedTuple):
    """Colours of everything that is not data."""

    text: str
    muted: str
    grid: str
    card: str
    accent: str


INK: dict[Theme, Ink] = {
    "dark": Ink("#e6e8eb", "#98a1ab", "#2b3037", "#16181c", "#3fb5a6"),
    "light": Ink("#1d2126", "#5c656f", "#dcdcd7", "#f4f4f2", "#0f766e"),
}
CHOSEN = "#E69F00"
"""The selected expert or layer is always this orange (the first of EXPERT_HUES)."""
MARGIN = {"l": 56, "r": 16, "t": 12, "b": 42}
NAMES_ABOVE = {**MARGIN, "t": 32}
"""For figures with names of alerts above the axes."""
FONT = "'Source Sans', 'Source Sans Pro', -apple-system, 'Segoe UI', sans-serif"


def blank(theme: Theme, height: int, **layout: Any) -> go.Figure:
    """An empty figure in the house style."""
    ink = INK[theme]
    axis = {
        "gridcolor": ink.grid,
        "linecolor": ink.grid,
        "zeroline": False,
        "tickcolor": ink.grid,
        "tickfont": {"color": ink.muted},
        "title": {"font": {"color": ink.muted, "size": 13}, "standoff": 8},
    }
    figure = go.Figure()
    figure.update_layout(
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 13, "color": ink.text},
        margin=MARGIN,
        hoverlabel={
            "bgcolor": ink.card,
            "bordercolor": ink.grid,
            "font": {"family": FONT, "color": ink.text},
        },
        legend={"orientation": "h", "y": 1.1, "yanchor": "bottom", "x": 0, "font": {"color": ink.muted}},
        xaxis=axis,
        yaxis=axis,
        separators=".\u202f",
    )
    return figure.update_layout(**layout)


def log2_load(load_rel: np.ndarray) -> np.ndarray:
    """Relative load (or lift) -> log2, clipped to the ends of the colour scale; NaN for exactly 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.log2(np.asarray(load_rel, dtype=np.float64))
    return np.where(np.isneginf(z), np.nan, np.clip(z, -LOAD_LIMIT, LOAD_LIMIT))


def load_scale(theme: Theme, title: str) -> dict[str, Any]:
    """Arguments of a heat map trace that draw log2 of a ratio on the load table."""
    ink = INK[theme]
    return {
        "colorscale": plotly_scale(load_ramp(theme)),
        "zmin": -LOAD_LIMIT,
        "zmax": LOAD_LIMIT,
        "colorbar": bar(ink, title, [z for z, _ in LOAD_TICKS], [text for _, text in LOAD_TICKS]),
    }


def unit_scale(theme: Theme, title: str, largest: float) -> dict[str, Any]:
    """Arguments of a heat map trace that draw 0 to `largest` on the sequential table."""
    return {
        "colorscale": plotly_scale(sequential_ramp()),
        "zmin": 0.0,
        "zmax": largest,
        "colorbar": bar(INK[theme], title),
    }


def bar(
    ink: Ink, title: str, values: list[int] | None = None, texts: list[str] | None = None
) -> dict[str, Any]:
    ticks: dict[str, Any] = {"tickvals": values, "ticktext": texts} if values else {}
    return {
        "title": {"text": title, "side": "top", "font": {"color": ink.muted, "size": 12}},
        "thickness": 10,
        "outlinewidth": 0,
        "tickfont": {"color": ink.muted, "size": 11},
        **ticks,
    }


def fade(color: str, opacity: float) -> str:
    """`#rrggbb` -> `rgba(r,g,b,opacity)`."""
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:.3g})"
