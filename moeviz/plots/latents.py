"""Latents of attention: how many directions are in use, which numbers or slots carry them, and one sequence's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moeviz.colors import Theme, load_ramp, plotly_scale
from moeviz.plots.style import CHOSEN, INK, bar, blank, fade, load_scale, log2_load, unit_scale

LatentScale = Literal["signed", "even", "weight"]
"""Around 0, blue below and orange above; compared with an even share, log2; from 0 on the sequential table."""

_FAINT_STEPS = 8
"""Steps besides the chosen one whose spectra are drawn."""
_DECADES = (-4.2, 0.1)
"""Of the axis of a spectrum; what is below counts for nothing."""
_TICKS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_LONGEST = 14
"""Characters of a token in a label."""


def latent_spectrum(frame: pd.DataFrame, *, step: int, theme: Theme = "dark", height: int = 300) -> go.Figure:
    """Share of each singular value, largest first, on a log axis; the chosen step in orange, others faint.

    A flat line uses every direction; one that falls off soon lives in few.

    Args:
        frame: `step`, `place` (1 for the largest), `share`.
        step: in front.
    """
    ink = INK[theme]
    steps = sorted(frame["step"].unique().tolist())
    others = [one for one in steps if one != step]
    picked = {
        others[at] for at in np.linspace(0, len(others) - 1, min(_FAINT_STEPS, len(others))).astype(int)
    }
    figure = blank(theme, height, showlegend=False, hovermode="closest")
    for at in [*sorted(picked), step]:
        rows = frame[(frame["step"] == at) & (frame["share"] > 0)]
        chosen = at == step
        figure.add_scatter(
            x=rows["place"],
            y=rows["share"],
            name=f"step {at:,}",
            mode="lines",
            line={"color": CHOSEN if chosen else fade(ink.muted, 0.55), "width": 2.4 if chosen else 1},
            hovertemplate=f"step {at:,}, direction %{{x}}: %{{y:.2%}}<extra></extra>",
        )
    places = int(frame["place"].max()) if len(frame) else 1
    figure.add_scatter(
        x=[1, places],
        y=[1 / places, 1 / places],
        name="all alike",
        mode="lines",
        line={"color": ink.text, "width": 1, "dash": "dash"},
        hovertemplate=f"all {places} directions alike: %{{y:.2%}}<extra></extra>",
    )
    figure.update_xaxes(title_text="direction, strongest first", showgrid=False)
    return figure.update_yaxes(
        title_text="share", type="log", range=_DECADES, tickvals=_TICKS, tickformat=".4~%"
    )


def latent_time_map(
    frame: pd.DataFrame,
    *,
    what: str,
    place: str,
    scale: LatentScale,
    least: float = 0.0,
    step: int | None = None,
    theme: Theme = "dark",
    height: int = 300,
) -> go.Figure:
    """One number for each dimension or slot over steps.

    Args:
        frame: `step`, `place`, `value`.
        what: the value, for the colour bar.
        place: what a row is, for the axis.
        scale: `even` compares with 1 / number of places; `weight` starts at 0.
        least: end of the scale at least, so that noise around 0 stays dark.
        step: marked.
    """
    wide = frame.pivot(index="place", columns="step", values="value").sort_index()
    figure = blank(theme, height, showlegend=False)
    figure.add_heatmap(
        x=wide.columns.to_numpy(),
        y=wide.index.to_numpy(),
        customdata=wide.to_numpy(),
        hovertemplate=f"step %{{x}}, {place} %{{y}}: %{{customdata:.3g}}<extra></extra>",
        **_coloured(wide.to_numpy(), scale, len(wide), what, theme, least),
    )
    if step is not None:
        figure.add_vline(step, line={"color": CHOSEN, "width": 1.5})
    figure.update_xaxes(title_text="step", showgrid=False)
    return figure.update_yaxes(title_text=place, autorange="reversed", showgrid=False)


def latent_picture(
    grid_SC: np.ndarray,
    *,
    place: str,
    scale: LatentScale,
    texts: Sequence[str] = (),
    block: int = 1,
    first: int = 0,
    theme: Theme = "dark",
    height: int = 560,
) -> go.Figure:
    """One sequence: a row per token, a column per number of the latent or slot.

    Args:
        grid_SC: values.
        place: what a column is.
        scale: how values become colours.
        texts: one per row; positions are shown where they are not known or rows are blocks of tokens.
        block: tokens that a row stands for.
        first: which token of the sequence the first row is.
    """
    rows, cols = grid_SC.shape
    named = block == 1 and len(texts) == rows
    labels = [_label(first + at, texts[at]) if named else str(first + at * block) for at in range(rows)]
    figure = blank(theme, height, showlegend=False)
    figure.add_heatmap(
        x=np.arange(cols),
        y=np.arange(rows),
        customdata=np.dstack([np.tile(np.array(labels, dtype=object)[:, None], (1, cols)), grid_SC]),
        hovertemplate=f"%{{customdata[0]}}, {place} %{{x}}: %{{customdata[1]:.3g}}<extra></extra>",
        **_coloured(grid_SC, scale, rows, "value" if scale == "signed" else "weight", theme),
    )
    stride = max(1, -(-rows * 14 // (height - 60)))
    ticks = list(range(0, rows, stride))
    figure.update_xaxes(title_text=place, showgrid=False)
    return figure.update_yaxes(
        autorange="reversed",
        showgrid=False,
        tickvals=ticks,
        ticktext=[labels[at] for at in ticks],
        tickfont={"family": "monospace", "size": 10, "color": INK[theme].muted},
    )


def _coloured(
    values: np.ndarray, scale: LatentScale, count: int, what: str, theme: Theme, least: float = 0.0
) -> dict[str, Any]:
    """`z` and colours of a heat map; `count` values that are all alike sum to 1 on the scale `even`."""
    if scale == "even":
        return {"z": log2_load(values * count), **load_scale(theme, "× even")}
    size = np.abs(values[np.isfinite(values)])
    top = max(float(size.max(initial=0.0)), least) or 1.0
    if scale == "weight":
        return {"z": values, **unit_scale(theme, what, top)}
    top = float(np.quantile(size, 0.99)) or top  # a few large numbers would grey out the rest
    return {
        "z": values,
        "colorscale": plotly_scale(load_ramp(theme)),
        "zmin": -top,
        "zmax": top,
        "colorbar": bar(INK[theme], what),
    }


def _label(at: int, text: str) -> str:
    shown = text.replace("\n", "↵").replace("<", "&lt;")
    shown = shown.strip() or shown.replace(" ", "·")
    return f"{shown[: _LONGEST - 1]}… {at}" if len(shown) > _LONGEST else f"{shown} {at}"
