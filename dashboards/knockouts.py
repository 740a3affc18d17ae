"""Cards of the Experts page: what the model loses without an expert, where an analysis took experts out."""

from __future__ import annotations

import streamlit as st

from dashboards.data import Answer
from dashboards.figure import draw
from moeviz.colors import Theme
from moeviz.plots.importance import knockout_bars

_HOW = (
    "Change of the loss on the probe when the expert is taken out, with two standard errors; faint: only noise. "
    "Either the router sends its tokens to the next expert, or nothing takes its place."
)


def draw_knockouts(found: Answer, layer: int, expert: int, theme: Theme) -> None:
    """The chosen expert by domain, and all experts of the layer on the whole probe.

    Args:
        found: `analysis` of the experts of the layer; may be empty, or without knock-outs.
    """
    removed = found.frame[found.frame["name"].str.startswith("knockout_")]
    if removed.empty:
        if not found.frame.empty:
            st.caption("`moeviz analyze RUN --knockout` adds what the model loses without each expert.")
        return
    mine, whole = removed[removed["unit"] == expert], removed[removed["label"] == "all"]
    left, right = st.columns(2)
    with left:
        draw(
            f"What the model loses without expert {expert}",
            _HOW,
            knockout_bars(mine, by="label", theme=theme),
            alt=f"Bars of the change of the loss on {mine['label'].nunique()} kinds of text without expert {expert}.",
            answer=found._replace(frame=mine),
            key="knockout_expert",
        )
    with right:
        draw(
            f"... and without each expert of layer {layer}",
            "On the whole probe, the largest effects first.",
            knockout_bars(whole, by="unit", theme=theme),
            alt=f"Bars of the change of the loss without each of {whole['unit'].nunique()} experts.",
            answer=found._replace(frame=whole),
            key="knockout_layer",
        )
