"""Text coloured by the expert each token went to, layer by layer."""

from __future__ import annotations

import streamlit as st

from dashboards import data, view
from dashboards.components.tokens import tokens, tokens_data
from dashboards.figure import card, data_behind, empty
from dashboards.pickers import domains_of, pick_domain

picked = view.current()
st.header("Tokens and their experts", anchor=False)
index = data.samples(picked).frame
if index.empty:
    empty("No token-level routing was recorded up to this step", "moeviz train --log-routing")
    st.stop()

left, middle, right = st.columns([1, 1, 2])
with middle:
    domain = pick_domain(domains_of(index))
if domain is not None:
    index = index[index["domain"] == domain]
steps = sorted(index["step"].unique().tolist(), reverse=True)
view.keep_valid("at", steps, steps[0])
at = left.selectbox("Sampled at step", steps, key="at", format_func=lambda step: f"{step:,}")
rows = {f"{row.rank}.{row.seq}": row for row in index[index["step"] == at].itertuples()}
view.keep_valid("sample", list(rows), next(iter(rows)))
sample = right.selectbox(
    "Sequence", list(rows), key="sample", format_func=lambda name: data.sample_name(rows[name])
)
view.link("at", "domain", "sample")

rank, seq = (int(part) for part in sample.split("."))
trace = data.trace(picked.path, at, seq, rank)
with card(
    "Where each token goes",
    "Colour is the first-choice expert in the layer on the dial: the seven busiest, the others grey. Point at a token "
    "for all its experts, weights and loss; press an expert to see only its tokens.",
    "tokens",
):
    tokens(tokens_data(trace, f"{at}.{sample}"), picked.layer, picked.expert, view.select("tokens", "place"))
    data_behind(lambda: data.ask(picked.path, at, "token_flow", step=at, seq=seq, rank=rank), "token_flow")
