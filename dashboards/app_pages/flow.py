"""Paths that tokens take from layer to layer, beyond chance."""

from __future__ import annotations

from itertools import pairwise

import streamlit as st

from dashboards import data, view
from dashboards.figure import card, draw, empty
from moeviz import plots

MOST_LAYERS, FIRST_LAYERS = 6, 4
ROUTES_HEIGHT = 560
ROUTE_COLUMNS = {
    "source": st.column_config.NumberColumn("from", format="E%d"),
    "target": st.column_config.NumberColumn("to", format="E%d"),
    "count": st.column_config.NumberColumn("tokens", format="localized"),
    "excess": st.column_config.NumberColumn("above chance", format="%+.0f"),
    "lift": st.column_config.NumberColumn("lift", format="%.1f×"),
}
LIFTS = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0)

picked, theme = view.current(), view.theme()
st.header("Paths through the layers", anchor=False)
index = data.samples(picked).frame
if index.empty or picked.info.num_layers < 2:
    empty("Paths need token-level routing of two or more MoE layers", "moeviz train --log-routing")
    st.stop()

left, middle, right = st.columns([3, 2, 2])
everything = list(range(picked.info.num_layers))
view.keep_valid_many("layers", everything, data.spread(everything, FIRST_LAYERS))
layers = sorted(
    left.multiselect(
        "Layers", everything, key="layers", max_selections=MOST_LAYERS, format_func=lambda at: f"L{at}"
    )
)
view.keep_valid("lift", LIFTS, 1.5)
lift = middle.select_slider("Show links from", LIFTS, key="lift", format_func=lambda at: f"{at:g}× chance")
domains = ["all", *sorted(index["domain"].dropna().unique())]
view.keep_valid("domain", domains, "all")
domain = right.selectbox("Domain", domains, key="domain")
view.link("layers", "lift", "domain")
if len(layers) < 2:
    st.info("Choose two or more layers to see paths between them.")
    st.stop()

first = int(index["step"].min())
moves = data.ask(
    picked.path,
    picked.step,
    "transitions",
    layers=tuple(layers),
    first=first,
    last=picked.step,
    domain=None if domain == "all" else domain,
)
found = plots.path_links(moves.frame, min_lift=lift)
hue = (
    "in the hue of the expert they come from, more solid the further above chance"
    if picked.expert is None
    else f"orange where they pass expert {picked.expert} of layer {picked.layer}"
)
draw(
    f"First-choice paths in the samples of steps {first:,} to {picked.step:,}",
    f"Bands are tokens on their way between experts, {hue}. The bands shown carry {found.shown:.0%} of all moves.",
    plots.path_sankey(found.links, layer=picked.layer, expert=picked.expert, theme=theme),
    alt=f"Alluvial diagram of {len(found.links)} links between {len(layers)} layers.",
    answer=moves._replace(frame=found.links),
    key="paths",
)
pairs = {f"{a}-{b}": (a, b) for a, b in pairwise(layers)}
names = list(pairs)
view.keep_valid("pair", names, names[0])
pair = st.segmented_control(
    "Pair of layers", names, key="pair", format_func=lambda at: "L{} → L{}".format(*pairs[at]), required=True
)
view.link("pair")
source, target = pairs[pair or names[0]]
between = moves.frame[(moves.frame["source_layer"] == source) & (moves.frame["target_layer"] == target)]
left, right = st.columns([3, 2])
with left:
    draw(
        f"All moves from layer {source} to layer {target}",
        "Row: expert in the first layer; column: expert in the second. Orange: more tokens than independent layers "
        "would send; blue: fewer; blank: none. A bright cell is a route.",
        plots.lift_matrix(
            between,
            num_sources=picked.info.layers[source].num_experts,
            num_targets=picked.info.layers[target].num_experts,
            expert=picked.expert if source == picked.layer else None,
            theme=theme,
        ),
        alt=f"Heat map of the lift of all expert pairs of layers {source} and {target}.",
        answer=moves._replace(frame=between),
        key="lift_matrix",
    )
with right, card("Strongest routes", "Most tokens above what chance would send, first.", "routes"):
    routes = plots.strongest_routes(between)
    st.dataframe(
        routes, hide_index=True, height=ROUTES_HEIGHT, column_config=ROUTE_COLUMNS, alt="Strongest routes."
    )
