"""What each head reads: all heads small, one large."""

from __future__ import annotations

from functools import partial

import streamlit as st

from dashboards import data, view
from dashboards.components.attention import attention, attention_data, head_grid, head_grid_data
from dashboards.figure import card, data_behind, empty

picked = view.current()
st.header("Attention", anchor=False)
index = data.until(data.ask(picked.path, picked.step, "attention_index"), picked).frame
if index.empty:
    empty("No attention map was recorded up to this step", "moeviz train --log-routing")
    st.stop()

left, right = st.columns([1, 3])
steps = sorted(index["step"].unique().tolist(), reverse=True)
view.keep_valid("map", steps, steps[0])
at = left.selectbox("Recorded at step", steps, key="map", format_func=lambda step: f"{step:,}")
index = index[index["step"] == at]
names = data.sequence_names(picked.path, at, sorted(index["seq"].unique().tolist()))
seqs = list(names)
view.keep_valid("seq", seqs, seqs[0])
seq = right.selectbox("Sequence", seqs, key="seq", format_func=lambda seq: names[seq])
index = index[index["seq"] == seq]
layers, heads = sorted(index["layer"].unique().tolist()), sorted(index["head"].unique().tolist())
view.keep_valid("block", layers, layers[0])
view.keep_valid("head", heads, heads[0])
layer, head = st.session_state["block"], st.session_state["head"]
view.link("map", "seq", "block", "head")

maps = data.attention_maps(picked.path, at, seq, index)
few, large = st.columns([10, 33])
with few, card("Heads", "A small map per recorded head. Press one to open it.", "heads"):
    press = view.select("head_grid", "head", layer="block", head="head")
    head_grid(head_grid_data(maps, layers, heads), layer, head, press)
with (
    large,
    card(
        f"Block {layer}, head {head}",
        "Row: the token that reads; column: the token that is read; one colour scale for all heads. Point at a row: "
        "the text shows what that token reads.",
        "attention",
    ),
):
    weights = maps.get((layer, head))
    if weights is None:
        st.caption("This head was not recorded for this sequence; press another one.")
    else:
        texts = data.trace(picked.path, at, seq, 0).texts
        attention(attention_data(weights, texts, f"{at}.{seq}"))
        table = partial(data.attention_answer, weights, at, layer, head, seq)
        data_behind(table, "attention_map")
