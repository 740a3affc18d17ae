"""The fixed probe over training: how settled the routing is, and what one expert takes of each domain."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moeviz.colors import Theme
from moeviz.plots.style import CHOSEN, INK, blank, fade, load_scale, log2_load

_ROW_PIXELS = 24
_FAINT = 0.3


def saturation_curves(
    frame: pd.DataFrame, *, layer: int, theme: Theme = "dark", height: int = 260
) -> go.Figure:
    """Share of the newest choices that were in place already; the chosen layer in orange, its first choices dotted.

    Args:
        frame: `step`, `layer`, `saturation`, `top1`, `chance`.
    """
    ink = INK[theme]
    figure = blank(theme, height, hovermode="closest")
    for at, rows in sorted(frame.groupby("layer"), key=lambda group: group[0] == layer):
        chosen = at == layer
        figure.add_scatter(
            x=rows["step"],
            y=rows["saturation"],
            name=f"layer {at}" if chosen else "other layers",
            mode="lines",
            line={"color": CHOSEN if chosen else fade(ink.muted, 0.55), "width": 2.2 if chosen else 1},
            showlegend=chosen,
            hovertemplate=f"layer {at}, step %{{x}}: %{{y:.0%}} of the choices<extra></extra>",
        )
    mine = frame[frame["layer"] == layer]
    for column, name, dash in (("top1", "first choices alone", "dot"), ("chance", "by chance", "dash")):
        figure.add_scatter(
            x=mine["step"],
            y=mine[column],
            name=name,
            mode="lines",
            line={"color": CHOSEN if column == "top1" else ink.text, "width": 1.2, "dash": dash},
            hovertemplate=f"{name}, step %{{x}}: %{{y:.0%}}<extra></extra>",
        )
    figure.update_xaxes(title_text="step", showgrid=False)
    return figure.update_yaxes(title_text="as in the newest weights", tickformat=".0%", range=[0, 1.02])


def domain_time_map(frame: pd.DataFrame, *, theme: Theme = "dark") -> go.Figure:
    """A row per domain, a column per pass over the probe: what an expert takes, over what shuffled domains show.

    Cells that chance explains are faint.

    Args:
        frame: `step`, `domain`, `share`, `null_mean`, `hidden` of one expert, domains in the order of the rows.
    """
    domains = list(dict.fromkeys(frame["domain"]))
    share_DC, null_DC, hidden_DC = (
        frame.pivot(index="domain", columns="step", values=name).loc[domains].to_numpy(dtype=np.float64)
        for name in ("share", "null_mean", "hidden")
    )
    ratio_DC = share_DC / np.maximum(null_DC, 1e-9)
    note_DC = np.where(hidden_DC > 0, ", as chance would", "")
    figure = blank(theme, 90 + _ROW_PIXELS * max(len(domains), 3))
    z_DC, steps = log2_load(np.maximum(ratio_DC, 1e-9)), np.unique(frame["step"])
    figure.add_heatmap(
        x=steps,
        y=domains,
        z=z_DC,
        customdata=np.stack([share_DC, ratio_DC, note_DC], axis=-1, dtype=object),
        ygap=1,
        opacity=_FAINT,
        hovertemplate="%{y}, step %{x}: %{customdata[0]:.0%} of its tokens, %{customdata[1]:.2f}× shuffled domains"
        "%{customdata[2]}<extra></extra>",
        **{**load_scale(theme, ""), "colorbar": None, "showscale": False},
    )
    figure.add_heatmap(
        x=steps,
        y=domains,
        z=np.where(hidden_DC > 0, np.nan, z_DC),
        ygap=1,
        hoverinfo="skip",
        **load_scale(theme, "× shuffled"),
    )
    figure.update_xaxes(title_text="step", showgrid=False)
    return figure.update_yaxes(autorange="reversed", showgrid=False, type="category", automargin=True)
