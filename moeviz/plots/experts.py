"""One expert: the tokens and domains it takes beyond its share, how its load went, and whom its layer works with."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moeviz.colors import Theme
from moeviz.plots.style import CHOSEN, INK, blank, fade, load_scale, log2_load

_ROW_PIXELS = 24


def token_lifts(frame: pd.DataFrame, *, theme: Theme = "dark") -> go.Figure:
    """Tokens of an expert, best lift first; 1 is its share of all tokens.

    Args:
        frame: `text`, `lift`, `count`, `total`, best first.
    """
    ink = INK[theme]
    names = [f"{visible(text)}\u2003{at + 1}" for at, text in enumerate(frame["text"])]
    figure = blank(theme, 70 + _ROW_PIXELS * max(len(frame), 3), showlegend=False, bargap=0.25)
    figure.add_bar(
        x=frame["lift"],
        y=names,
        orientation="h",
        customdata=frame[["count", "total"]],
        text=[f"{count} of {total}" for count, total in zip(frame["count"], frame["total"], strict=True)],
        textposition="inside",
        insidetextanchor="start",
        textfont={"color": ink.card, "size": 11},
        marker={"color": fade(ink.accent, 0.8)},
        hovertemplate="%{customdata[0]:d} of %{customdata[1]:d} occurrences, %{x:.2f}× its share<extra></extra>",
    )
    figure.add_vline(1, line={"color": ink.muted, "width": 1})
    figure.update_xaxes(title_text="× its share of all tokens", rangemode="tozero")
    return figure.update_yaxes(autorange="reversed", showgrid=False, type="category", automargin=True)


def domain_bars(frame: pd.DataFrame, *, theme: Theme = "dark") -> go.Figure:
    """Share of each domain's tokens that an expert takes, beside its null of three standard deviations.

    Args:
        frame: `label` (the domain), `value`, `null_mean`, `null_sd`, `hidden` (chance explains it: drawn faint).
    """
    ink = INK[theme]
    rows = frame.sort_values("value", ascending=False, kind="stable")
    figure = blank(theme, 70 + _ROW_PIXELS * max(len(rows), 3), bargap=0.25)
    figure.add_bar(
        x=rows["value"],
        y=rows["label"],
        orientation="h",
        name="this expert",
        marker={"color": [fade(ink.accent, 0.25 if faint else 0.85) for faint in rows["hidden"]]},
        hovertemplate="%{y}: %{x:.1%} of its tokens<extra></extra>",
    )
    figure.add_scatter(
        x=rows["null_mean"],
        y=rows["label"],
        mode="markers",
        name="by chance, ± 3 sd",
        error_x={"array": 3 * rows["null_sd"], "color": ink.muted, "thickness": 1.5, "width": 4},
        marker={"color": ink.muted, "size": 6},
        hovertemplate="%{y} by chance: %{x:.1%}<extra></extra>",
    )
    end = 1.05 * float((rows["null_mean"] + 3 * rows["null_sd"]).fillna(0.0).clip(lower=rows["value"]).max())
    figure.update_xaxes(
        title_text="share of the domain's tokens", tickformat=".0%", range=[0, min(end, 1.02)]
    )
    return figure.update_yaxes(autorange="reversed", showgrid=False, type="category", automargin=True)


def life_line(frame: pd.DataFrame, *, noise: float, theme: Theme = "dark", height: int = 260) -> go.Figure:
    """Relative load of one expert over steps.

    Args:
        frame: `step`, `load_rel` of one expert.
        noise: half width of the band around 1 that sampling alone explains.
    """
    ink = INK[theme]
    figure = blank(theme, height, showlegend=False)
    figure.add_hrect(1 - noise, 1 + noise, fillcolor=fade(ink.muted, 0.16), line_width=0, layer="below")
    figure.add_hline(1, line={"color": ink.muted, "width": 1}, layer="below")
    figure.add_scatter(
        x=frame["step"],
        y=frame["load_rel"],
        mode="lines",
        line={"color": CHOSEN, "width": 1.8},
        hovertemplate="step %{x}: %{y:.2f}× the even share<extra></extra>",
    )
    figure.update_xaxes(title_text="step", showgrid=False)
    return figure.update_yaxes(title_text="× even share", rangemode="tozero")


def coactivation_map(
    frame: pd.DataFrame,
    *,
    num_experts: int,
    expert: int | None = None,
    theme: Theme = "dark",
    height: int = 460,
) -> go.Figure:
    """How much more often two experts of a layer work on the same token than random choice has them.

    Args:
        frame: `expert`, `other`, `count`, `share` (of the expert's tokens), `lift`; the diagonal is left out.
        expert: row that is outlined.
    """
    shape = (num_experts, num_experts)
    lift, details = np.full(shape, np.nan), np.zeros((*shape, 3))
    at = (frame["expert"].to_numpy(dtype=int), frame["other"].to_numpy(dtype=int))
    lift[at] = frame["lift"]
    details[at] = frame[["count", "share", "lift"]].fillna(0.0)
    gap = 1 if num_experts <= 64 else 0
    figure = blank(theme, height, showlegend=False)
    figure.add_heatmap(
        z=log2_load(lift),
        customdata=details,
        hovertemplate="E%{y} with E%{x}: %{customdata[0]:d} tokens, %{customdata[1]:.1%} of E%{y}'s, "
        "%{customdata[2]:.2f}× chance<extra></extra>",
        hoverongaps=False,
        xgap=gap,
        ygap=gap,
        **load_scale(theme, "lift"),
    )
    if expert is not None:
        outline = {"color": CHOSEN, "width": 1.5}
        figure.add_hrect(expert - 0.5, expert + 0.5, line=outline, fillcolor="rgba(0,0,0,0)")
    every = max(1, num_experts // 8)
    figure.update_xaxes(title_text="with expert", showgrid=False, dtick=every)
    return figure.update_yaxes(title_text="expert", autorange="reversed", showgrid=False, dtick=every)


def coactivation_rows(counts_EE: np.ndarray, top_k: int) -> pd.DataFrame:
    """Counts of pairs as a table for `coactivation_map`, pairs of different experts that were both used.

    Args:
        counts_EE: tokens on which both experts are active; the diagonal holds the tokens of each.
        top_k: experts per token, at least 2.

    Returns: expert, other, count, share (of the expert's tokens), lift. A token cannot take one expert twice, so for
    even loads random choice gives (k-1)/k x E/(E-1) of what independence would; lift is over that, 1 at random.
    """
    used_E = np.diag(counts_EE).astype(np.float64)
    tokens, num_experts = used_E.sum() / top_k, len(used_E)
    at_random = (top_k - 1) / top_k * num_experts / (num_experts - 1)
    expert, other = np.nonzero(np.outer(used_E, used_E) * (1 - np.eye(num_experts)))
    count = counts_EE[expert, other]
    return pd.DataFrame(
        {
            "expert": expert,
            "other": other,
            "count": count,
            "share": count / used_E[expert],
            "lift": count * tokens / (used_E[expert] * used_E[other]) / at_random,
        }
    )


def visible(text: str) -> str:
    """A token with its spaces and line ends made visible, and nothing that a browser takes for markup."""
    shown = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")[:24]
