"""Loads of one layer: now (sorted bars), who takes over (river), and everything over time (map)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moeviz.colors import DEAD_MARK, EXPERT_HUES, Theme
from moeviz.plots.style import CHOSEN, INK, NAMES_ABOVE, blank, fade, load_scale, log2_load

_HUES = EXPERT_HUES[:7]
_OTHER = EXPERT_HUES[7]
_DEAD_MARKS = 48
"""Dead marks of one expert along the time axis at most."""


def load_bars(
    frame: pd.DataFrame, *, noise: float, expert: int | None = None, theme: Theme = "dark", height: int = 300
) -> go.Figure:
    """Loads of one layer at one step, largest first, against the even share.

    Args:
        frame: `expert`, `load_rel` (1 is even), `share`.
        noise: half width of the band around 1 that sampling alone explains, in units of the even share.
        expert: drawn in orange.
    """
    ink = INK[theme]
    rows = frame.sort_values(["load_rel", "expert"], ascending=[False, True], kind="stable")
    names = [str(at) for at in rows["expert"]]
    figure = blank(theme, height, showlegend=False, bargap=0.18)
    figure.add_hrect(1 - noise, 1 + noise, fillcolor=fade(ink.muted, 0.16), line_width=0, layer="below")
    figure.add_hline(1, line={"color": ink.muted, "width": 1}, layer="below")
    figure.add_bar(
        x=names,
        y=rows["load_rel"],
        customdata=rows["share"],
        marker={"color": [CHOSEN if at == expert else fade(ink.accent, 0.75) for at in rows["expert"]]},
        hovertemplate="expert %{x}: %{y:.2f}× the even share (%{customdata:.1%} of assignments)<extra></extra>",
    )
    dead = rows["load_rel"].to_numpy() == 0
    figure.add_scatter(
        x=[name for name, is_dead in zip(names, dead, strict=True) if is_dead],
        y=np.zeros(int(dead.sum())),
        mode="text",
        text=DEAD_MARK,
        textposition="top center",
        textfont={"color": ink.text, "size": 14},
        hoverinfo="skip",
    )
    figure.update_xaxes(showgrid=False, type="category", tickangle=0, title_text="expert")
    return figure.update_yaxes(title_text="× even share", rangemode="tozero")


def river_groups(frame: pd.DataFrame, top: int = 7, keep: int | None = None) -> pd.DataFrame:
    """Shares over time of the experts that changed most, the rest summed.

    Args:
        frame: `step`, `expert`, `share`.
        top: experts kept; change is the largest minus the smallest share.
        keep: an expert kept in any case.

    Returns: step, group (the expert's number as text, or `other`), share; kept experts by number, `other` last. The
    shares of a step sum to what they did before.
    """
    wide = frame.pivot(index="step", columns="expert", values="share").fillna(0.0)
    change = (wide.max() - wide.min()).sort_values(ascending=False, kind="stable")
    first = [keep] if keep in wide.columns else []
    kept = sorted((first + [at for at in change.index if at != keep])[:top])
    groups = wide[kept].rename(columns=str)
    if len(kept) < wide.shape[1]:
        groups["other"] = wide.drop(columns=kept).sum(axis=1)
    return groups.rename_axis(columns="group").stack().rename("share").reset_index()


def load_river(
    groups: pd.DataFrame, *, expert: int | None = None, theme: Theme = "dark", height: int = 300
) -> go.Figure:
    """Stacked shares over steps, in fixed order, one hue per expert.

    Args:
        groups: `step`, `group`, `share` as `river_groups` gives them.
        expert: drawn in orange.
    """
    ink = INK[theme]
    figure = blank(theme, height, hovermode="x unified", legend_traceorder="normal", margin=NAMES_ABOVE)
    free = [hue for hue in _HUES if hue != CHOSEN or expert is None]
    for group, rows in groups.groupby("group", sort=False):
        chosen = str(group) == str(expert)
        hue = _OTHER if group == "other" else CHOSEN if chosen else free.pop(0)
        figure.add_scatter(
            x=rows["step"],
            y=rows["share"],
            name="other" if group == "other" else f"E{group}",
            stackgroup="load",
            mode="lines",
            line={"width": 0.6, "color": ink.card},
            fillcolor=fade(hue, 0.35 if group == "other" else 0.85),
            hovertemplate="%{y:.1%}",
        )
    figure.update_xaxes(title_text="step", showgrid=False, range=[groups["step"].min(), groups["step"].max()])
    return figure.update_yaxes(title_text="share of assignments", tickformat=".0%", range=[0, 1])


def load_time_map(
    frame: pd.DataFrame, *, expert: int | None = None, theme: Theme = "dark", height: int = 340
) -> go.Figure:
    """Relative load of every expert over steps, log2 around the even share; × where no token came at all.

    Args:
        frame: `step`, `expert`, `load_rel`.
        expert: marked at the axis.
    """
    ink = INK[theme]
    wide = frame.pivot(index="expert", columns="step", values="load_rel").sort_index()
    figure = blank(theme, height, showlegend=False)
    figure.add_heatmap(
        x=wide.columns.to_numpy(),
        y=wide.index.to_numpy(),
        z=log2_load(wide.to_numpy()),
        customdata=wide.to_numpy(),
        hovertemplate="step %{x}, expert %{y}: %{customdata:.2f}× the even share<extra></extra>",
        **load_scale(theme, "× even"),
    )
    experts, steps = np.nonzero(wide.to_numpy()[:, :: max(1, wide.shape[1] // _DEAD_MARKS)] == 0)
    thinned = wide.columns.to_numpy()[:: max(1, wide.shape[1] // _DEAD_MARKS)]
    figure.add_scatter(
        x=thinned[steps],
        y=wide.index.to_numpy()[experts],
        mode="markers",
        marker={"symbol": "x-thin", "size": 5, "line": {"width": 1, "color": ink.muted}},
        hoverinfo="skip",
    )
    if expert is not None and expert in wide.index:
        figure.add_hrect(
            expert - 0.5, expert + 0.5, line={"color": CHOSEN, "width": 1.5}, fillcolor="rgba(0,0,0,0)"
        )
    figure.update_xaxes(title_text="step", showgrid=False)
    return figure.update_yaxes(title_text="expert", autorange="reversed", showgrid=False)
