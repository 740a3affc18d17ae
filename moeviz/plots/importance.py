"""What a model loses without an expert, in the two ways of taking it out."""

from __future__ import annotations

from typing import Literal

import pandas as pd
import plotly.graph_objects as go

from moeviz.colors import Theme
from moeviz.plots.style import CHOSEN, INK, blank, fade

_ROW_PIXELS = 34
_MODES = {"knockout_reroute": "the next expert takes over", "knockout_zero": "nothing takes its place"}
_SHOWN = 24
"""Bars of a mode at most: the largest effects."""


def knockout_rows(frame: pd.DataFrame, by: Literal["label", "unit"]) -> pd.DataFrame:
    """The rows of a chart: the largest effects of either mode, and which are no more than noise.

    Args:
        frame: `name` (knockout_reroute or knockout_zero), `label`, `unit`, `value`, `null_sd` (its standard error).
        by: a bar for each of these.

    Returns: `by`, name, value, error (two standard errors), noise (the effect is within them); the largest mean effect
    first, `all` before the domains.
    """
    rows = frame[frame["name"].isin(_MODES)].copy()
    rows["error"] = 2 * rows["null_sd"]
    rows["noise"] = rows["value"].abs() <= rows["error"]
    size = rows.groupby(by)["value"].mean().abs()
    rows["place"] = rows[by].map(size).where(rows[by] != "all", float("inf"))
    kept = rows.groupby(by)["place"].first().nlargest(_SHOWN).index
    rows = rows[rows[by].isin(kept)].sort_values(["place", "name"], ascending=[False, True], kind="stable")
    return rows[[by, "name", "value", "error", "noise"]].reset_index(drop=True)


def knockout_bars(frame: pd.DataFrame, *, by: Literal["label", "unit"], theme: Theme = "dark") -> go.Figure:
    """Change of the loss without an expert, with two standard errors; an effect within them is faint.

    Args:
        frame: as in `knockout_rows`.
        by: a bar for each `label` (domain) of one expert, or for each `unit` (expert) of a layer.
    """
    ink = INK[theme]
    rows = knockout_rows(frame, by)
    figure = blank(theme, 90 + _ROW_PIXELS * max(rows[by].nunique(), 3), bargap=0.3, barmode="group")
    for mode, color in zip(_MODES, (ink.accent, CHOSEN), strict=True):
        mine = rows[rows["name"] == mode]
        names = [f"expert {at}" for at in mine[by]] if by == "unit" else list(mine[by])
        figure.add_bar(
            x=mine["value"],
            y=names,
            orientation="h",
            name=_MODES[mode],
            marker={"color": [fade(color, 0.25 if faint else 0.85) for faint in mine["noise"]]},
            error_x={"array": mine["error"], "color": ink.muted, "thickness": 1.2, "width": 3},
            hovertemplate="%{y}: %{x:+.4f} ± %{error_x.array:.4f} nats per token<extra></extra>",
        )
    figure.add_vline(0, line={"color": ink.muted, "width": 1})
    figure.update_xaxes(title_text="loss without it minus loss, nats per token")
    return figure.update_yaxes(autorange="reversed", showgrid=False, type="category", automargin=True)
