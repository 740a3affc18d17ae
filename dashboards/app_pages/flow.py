"""Paths that tokens take from layer to layer, beyond chance."""

from __future__ import annotations

import streamlit as st

from dashboards import data, view
from dashboards.figure import draw, draw_table, empty
from dashboards.pickers import domains_of, pick_pair, pick_paths
from moeviz import plots

picked, theme = view.current(), view.theme()
st.header("Paths through the layers", anchor=False)
samples = data.samples(picked).frame
if samples.empty or picked.info.num_layers < 2:
    empty("Paths need token-level routing of two or more MoE layers", "moeviz train --log-routing")
    st.stop()
asked = pick_paths(picked.info.num_layers, domains_of(samples))
if len(asked.layers) < 2:
    st.info("Choose two or more layers to see paths between them.")
    st.stop()

first = int(samples["step"].min())
span = {"first": first, "last": picked.step, "domain": asked.domain}
moves = data.ask(picked.path, picked.step, "transitions", layers=asked.layers, **span)
found = plots.path_links(moves.frame, min_lift=asked.min_lift)
hue = (
    "in the hue of the expert they come from, more solid the further above chance"
    if picked.expert is None
    else f"orange where they pass expert {picked.expert} of layer {picked.layer}"
)
draw(
    f"First-choice paths in the samples of steps {first:,} to {picked.step:,}",
    f"Bands are tokens on their way between experts, {hue}. The bands shown carry {found.shown:.0%} of all moves.",
    plots.path_sankey(found.links, layer=picked.layer, expert=picked.expert, theme=theme),
    alt=f"Alluvial diagram of {len(found.links)} links between {len(asked.layers)} layers.",
    answer=moves._replace(frame=found.links),
    key="paths",
)

source, target = pick_pair(asked.layers)
between = moves.frame[(moves.frame["source_layer"] == source) & (moves.frame["target_layer"] == target)]
matrix = plots.lift_matrix(
    between,
    num_sources=picked.info.layers[source].num_experts,
    num_targets=picked.info.layers[target].num_experts,
    expert=picked.expert if source == picked.layer else None,
    theme=theme,
)
left, right = st.columns([3, 2])
with left:
    draw(
        f"All moves from layer {source} to layer {target}",
        "Row: expert in the first layer; column: expert in the second. Orange: more tokens than independent layers "
        "would send; blue: fewer; blank: none. A bright cell is a route.",
        matrix,
        alt=f"Heat map of the lift of all expert pairs of layers {source} and {target}.",
        answer=moves._replace(frame=between),
        key="lift_matrix",
    )
with right:
    draw_table(
        "Strongest routes",
        "Pairs that carry most tokens above what chance would send, first.",
        plots.strongest_routes(between),
        formats={"source": "E%d", "target": "E%d", "count": "localized", "excess": "%+.0f", "lift": "%.1f×"},
        names={"source": "from", "target": "to", "count": "tokens", "excess": "above chance"},
        key="routes",
    )
