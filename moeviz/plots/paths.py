"""Where tokens go from layer to layer: an alluvial drawing of few layers, and its matrix twin at full width.

A link is worth drawing when it carries more tokens than independent layers would send: its lift. Counts alone would
only show once more which experts are busy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moeviz.colors import EXPERT_HUES, Theme
from moeviz.plots.style import CHOSEN, INK, blank, fade, load_scale, log2_load

_HUES = EXPERT_HUES[1:7]
"""Without the orange, which is kept for a chosen expert."""
_MARGIN = {"l": 8, "r": 8, "t": 36, "b": 10}
_PAD = 6
"""Pixels between two nodes of a layer."""
_LABEL_PIXELS = 9
"""Height of a node from which its name fits."""
OTHER = -1
"""Stands for all experts of a layer outside the ones shown."""


class PathLinks(NamedTuple):
    """What `path_sankey` draws."""

    links: pd.DataFrame
    """source_layer, source, target_layer, target (OTHER for the rest), count, expected, lift."""
    shown: float
    """Share of all counts that the links carry, 0 to 1."""
    left_out: int
    """Links above the threshold that did not fit `max_links`."""


def path_links(
    transitions: pd.DataFrame, *, top: int = 16, min_lift: float = 1.5, max_links: int = 400
) -> PathLinks:
    """Keep the busiest experts of each layer, sum the rest as OTHER, and keep the links above chance.

    Args:
        transitions: `source_layer`, `source`, `target_layer`, `target`, `count`, for consecutive chosen layers.
        top: experts shown per layer, by tokens through them.
        min_lift: count / (count expected if layers were independent) from which a link is shown.
        max_links: at most so many, the largest counts first.
    """
    rows = transitions[["source_layer", "source", "target_layer", "target", "count"]].copy()
    kept = _busiest(rows, top)
    for side in ("source", "target"):
        rare = ~pd.MultiIndex.from_frame(rows[[f"{side}_layer", side]]).isin(kept)
        rows.loc[rare, side] = OTHER
    keys = ["source_layer", "source", "target_layer", "target"]
    rows = rows.groupby(keys, as_index=False)["count"].sum()
    pair = ["source_layer", "target_layer"]
    total = rows.groupby(pair)["count"].transform("sum")
    out = rows.groupby([*pair, "source"])["count"].transform("sum")
    into = rows.groupby([*pair, "target"])["count"].transform("sum")
    rows["expected"] = out * into / total
    rows["lift"] = rows["count"] / rows["expected"]
    above = rows[rows["lift"] >= min_lift].sort_values(
        ["count", *keys], ascending=[False, True, True, True, True]
    )
    links = above.head(max_links).sort_values(keys).reset_index(drop=True)
    everything = float(rows["count"].sum())
    shown = float(links["count"].sum()) / everything if everything else 0.0
    return PathLinks(links, shown, len(above) - len(links))


def _busiest(rows: pd.DataFrame, top: int) -> pd.MultiIndex:
    """(layer, expert) of the `top` experts with most tokens in each layer."""
    sides = [
        rows[[f"{side}_layer", side, "count"]].set_axis(["layer", "expert", "count"], axis=1)
        for side in ("source", "target")
    ]
    # A layer in the middle is a target of one pair and a source of the next: its larger total is what it carries.
    totals = [side.groupby(["layer", "expert"])["count"].sum() for side in sides]
    through = pd.concat(totals).groupby(level=[0, 1]).max().rename("count").reset_index()
    through = through.sort_values(["layer", "count", "expert"], ascending=[True, False, True])
    return pd.MultiIndex.from_frame(through.groupby("layer").head(top)[["layer", "expert"]])


def strongest_routes(transitions: pd.DataFrame, limit: int = 50) -> pd.DataFrame:
    """Pairs of experts that carry most tokens beyond independence.

    Args:
        transitions: `source`, `target`, `count`, `expected`, `lift` of one pair of layers.

    Returns: source, target, count, excess (count - expected), lift; largest excess first.
    """
    rows = transitions.assign(excess=transitions["count"] - transitions["expected"])
    rows = rows[rows["excess"] > 0].sort_values("excess", ascending=False, kind="stable")
    return rows[["source", "target", "count", "excess", "lift"]].head(limit).reset_index(drop=True)


def path_sankey(
    links: pd.DataFrame,
    *,
    layer: int | None = None,
    expert: int | None = None,
    theme: Theme = "dark",
    height: int = 540,
) -> go.Figure:
    """Links between layers from left to right, experts by number from the top, `other` last.

    A link has the hue of the expert it comes from (the busiest of each layer, the rest grey) and is the more solid
    the further it lies above chance.

    Args:
        links: the `links` of `path_links`.
        layer, expert: with an expert, only links through it are coloured, in orange.
    """
    ink = INK[theme]
    nodes = _nodes(links, height - _MARGIN["t"] - _MARGIN["b"])
    nodes["hue"] = _hues(nodes, layer, expert, ink.muted)
    index = {(row.layer, row.expert): at for at, row in enumerate(nodes.itertuples())}
    sources = [index[pair] for pair in zip(links["source_layer"], links["source"], strict=True)]
    targets = [index[pair] for pair in zip(links["target_layer"], links["target"], strict=True)]
    figure = blank(theme, height, margin=_MARGIN)
    figure.add_sankey(
        arrangement="fixed",
        node={
            "label": [
                "" if row.pixels < _LABEL_PIXELS else "other" if row.expert == OTHER else f"E{row.expert}"
                for row in nodes.itertuples()
            ],
            "x": nodes["x"],
            "y": nodes["y"],
            "color": nodes["hue"],
            "line": {"width": 0},
            "pad": _PAD,
            "thickness": 12,
            "customdata": [
                f"layer {row.layer}, {'other experts' if row.expert == OTHER else f'expert {row.expert}'}"
                for row in nodes.itertuples()
            ],
            "hovertemplate": "%{customdata}: %{value:d} tokens<extra></extra>",
        },
        link={
            "source": sources,
            "target": targets,
            "value": links["count"],
            "color": _link_colors(links, nodes, sources, targets, layer, expert),
            "customdata": [
                f"L{row.source_layer} {_name(row.source)} → L{row.target_layer} {_name(row.target)}: "
                f"{row.count_:,.0f} tokens, {row.lift:.1f}× chance"
                for row in links.rename(columns={"count": "count_"}).itertuples()
            ],
            "hovertemplate": "%{customdata}<extra></extra>",
        },
        textfont={"color": ink.text, "size": 12},
    )
    return _name_layers(figure, sorted(set(nodes["layer"])), ink.muted)


def _name(expert: int) -> str:
    return "other" if expert == OTHER else f"E{expert}"


def _hues(nodes: pd.DataFrame, layer: int | None, expert: int | None, grey: str) -> list[str]:
    """One hue per node: the busiest experts of each layer, or with a chosen expert that one alone."""
    if expert is not None:
        chosen = (nodes["layer"] == layer) & (nodes["expert"] == expert)
        return [CHOSEN if hit else grey for hit in chosen]
    busy = nodes[nodes["expert"] != OTHER].groupby("layer")["count"].rank(ascending=False, method="first")
    return [_HUES[int(rank) - 1] if rank <= len(_HUES) else grey for rank in busy.reindex(nodes.index)]


def _link_colors(
    links: pd.DataFrame,
    nodes: pd.DataFrame,
    sources: list[int],
    targets: list[int],
    layer: int | None,
    expert: int | None,
) -> list[str]:
    strength = np.clip(np.log2(links["lift"].to_numpy(dtype=float)) / 3, 0.0, 1.0)
    hues = nodes["hue"].to_numpy()
    if expert is None:
        return [fade(hues[at], 0.22 + 0.4 * weight) for at, weight in zip(sources, strength, strict=True)]
    through = [CHOSEN in (hues[a], hues[b]) for a, b in zip(sources, targets, strict=True)]
    grey = hues[hues != CHOSEN][0] if (hues != CHOSEN).any() else CHOSEN
    return [fade(CHOSEN, 0.75) if hit else fade(grey, 0.13) for hit in through]


def _nodes(links: pd.DataFrame, pixels: float) -> pd.DataFrame:
    """Nodes of the links with places: columns by layer, rows by expert number, each column centred.

    plotly scales all columns alike, by the one that fills the height; the centres given here follow that rule.
    """
    sides = [
        links[[f"{side}_layer", side, "count"]].set_axis(["layer", "expert", "count"], axis=1)
        for side in ("source", "target")
    ]
    totals = [side.groupby(["layer", "expert"])["count"].sum() for side in sides]
    nodes = pd.concat(totals).groupby(level=[0, 1]).max().rename("count").reset_index()
    nodes["last"] = nodes["expert"] == OTHER
    nodes = nodes.sort_values(["layer", "last", "expert"]).reset_index(drop=True)
    layers = sorted(set(nodes["layer"]))
    # Exactly 0 or 1 means "place it yourself" to plotly.
    nodes["x"] = [0.001 + 0.998 * layers.index(at) / max(len(layers) - 1, 1) for at in nodes["layer"]]
    columns = nodes.groupby("layer")["count"].agg(["sum", "size"])
    scale = ((pixels - _PAD * (columns["size"] - 1)) / columns["sum"]).min() if len(columns) else 0.0
    nodes["pixels"] = nodes["count"] * scale
    nodes["y"] = 0.0
    for _, rows in nodes.groupby("layer"):
        ends = np.cumsum(rows["pixels"].to_numpy() + _PAD) - _PAD
        top = (pixels - ends[-1]) / 2
        nodes.loc[rows.index, "y"] = np.clip((top + ends - rows["pixels"] / 2) / pixels, 0.001, 0.999)
    return nodes


def _name_layers(figure: go.Figure, layers: list[int], color: str) -> go.Figure:
    for at, name in enumerate(layers):
        figure.add_annotation(
            x=at / max(len(layers) - 1, 1),
            y=1.0,
            yshift=24,
            text=f"layer {name}",
            showarrow=False,
            xref="paper",
            yref="paper",
            xanchor="left" if at == 0 else "right" if at == len(layers) - 1 else "center",
            font={"color": color},
        )
    return figure


def lift_matrix(
    transitions: pd.DataFrame,
    *,
    num_sources: int,
    num_targets: int,
    expert: int | None = None,
    theme: Theme = "dark",
    height: int = 520,
) -> go.Figure:
    """Every expert of one layer against every expert of a later one; log2 of the lift over independence.

    Args:
        transitions: `source`, `target`, `count`, `lift` of one pair of layers.
        expert: source row that is outlined.
    """
    shape = (num_sources, num_targets)
    lift, count = np.full(shape, np.nan), np.zeros(shape)
    at = (transitions["source"].to_numpy(dtype=int), transitions["target"].to_numpy(dtype=int))
    lift[at], count[at] = transitions["lift"], transitions["count"]
    figure = blank(theme, height, showlegend=False)
    figure.add_heatmap(
        z=log2_load(lift),
        customdata=np.dstack([count, np.nan_to_num(lift)]),
        hovertemplate="E%{y} → E%{x}: %{customdata[0]:d} tokens, %{customdata[1]:.2f}× chance<extra></extra>",
        hoverongaps=False,
        xgap=1 if max(shape) <= 64 else 0,
        ygap=1 if max(shape) <= 64 else 0,
        **load_scale(theme, "lift"),
    )
    if expert is not None and expert < num_sources:
        figure.add_hrect(
            expert - 0.5, expert + 0.5, line={"color": CHOSEN, "width": 1.5}, fillcolor="rgba(0,0,0,0)"
        )
    first, second = transitions["source_layer"].iloc[0], transitions["target_layer"].iloc[0]
    every = max(1, max(shape) // 8)
    figure.update_xaxes(
        title_text=f"expert of layer {second}", showgrid=False, constrain="domain", dtick=every
    )
    return figure.update_yaxes(
        title_text=f"expert of layer {first}",
        showgrid=False,
        autorange="reversed",
        scaleanchor="x",
        dtick=every,
    )
