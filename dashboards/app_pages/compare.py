"""Runs side by side: who learns more, and whose experts share the work."""

from __future__ import annotations

import streamlit as st

from dashboards import compared, view
from dashboards.figure import draw, draw_table
from dashboards.runs import asked_run, available
from moeviz import plots

theme = view.theme()
st.header("Compare", anchor=False)
paths = available(asked_run()).paths
names = list(paths)
view.keep_valid_many("runs", names, names[: plots.MOST_RUNS])
chosen = st.multiselect(
    "Runs", names, key="runs", max_selections=plots.MOST_RUNS, help="Runs beside the one that was opened."
)
if set(chosen) != set(names[: plots.MOST_RUNS]):
    view.link("runs")

losses, loads = (
    compared.curves(paths, chosen, "scalar", "val_loss"),
    compared.curves(paths, chosen, "metric", "maxvio_global"),
)
left, right = st.columns(2)
with left:
    draw(
        "Validation loss",
        "Nats per token of held-out text, by the weights of each step. Runs with other tokenizers do not compare.",
        plots.run_curves(losses.frame, chosen, label="nats per token", theme=theme),
        alt=f"Validation loss of {losses.frame['run'].nunique()} runs over steps.",
        answer=losses,
        key="compare_loss",
    )
with right:
    draw(
        "MaxVio of recent loads",
        "Most loaded expert over the even share, minus 1, mean over layers; logarithmic. Runs without experts or "
        "recorded routing have no line.",
        plots.run_curves(loads.frame, chosen, label="MaxVio", log=True, theme=theme),
        alt=f"MaxVio of {loads.frame['run'].nunique()} runs over steps.",
        answer=loads,
        key="compare_maxvio",
    )
draw_table(
    "At their newest steps",
    "MaxVio: of recent loads, mean over layers. Alerts: rules open now.",
    compared.table(paths, chosen),
    formats={"step": "localized", "val_loss": "%.4f", "maxvio_global": "%.3f", "parameters": "compact"},
    names={"val_loss": "validation loss", "maxvio_global": "MaxVio", "alerts": "alerts open"},
    key="compare_table",
)
