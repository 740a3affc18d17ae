"""One layer over time: who takes over, when, and whether it is more than noise."""

from __future__ import annotations

import streamlit as st

from dashboards import data, noise, view
from dashboards.figure import draw, empty
from moeviz import plots

METRICS = {
    "load_entropy": ("Load entropy", "Entropy of the load over its maximum ln E; 1 is even", (0.0, 1.02)),
    "maxvio_batch": ("MaxVio", "Largest relative load minus 1; 0 is even", None),
    "n_eff": ("Effective experts", "Exponential of the load entropy: how many experts do the work", None),
    "gini": ("Gini", "Inequality of the loads; 0 is even", (0.0, 1.0)),
    "route_entropy": (
        "Router entropy",
        "Mean entropy of a token's scores over ln E; 0 is decided",
        (0.0, 1.02),
    ),
}

picked, theme = view.current(), view.theme()
st.header(f"Loads of layer {picked.layer}", anchor=False)
if picked.step < 0:
    empty("No step of this run has been written yet", "moeviz train --log-routing")
    st.stop()

now = data.ask(picked.path, picked.step, "load_matrix", step=picked.step)
history = data.ask(
    picked.path, picked.step, "load_over_time", layer=picked.layer, points=400, last=picked.step
)
alerts = data.ask(picked.path, picked.step, "alerts").frame
mine = alerts[(alerts["layer"] == picked.layer) & (alerts["raised_step"] <= picked.step)]
here = now._replace(frame=now.frame[now.frame["layer"] == picked.layer])
shape = (noise.tokens_of(here.frame, picked.top_k), picked.top_k, picked.width)

left, right = st.columns([2, 3])
with left:
    draw(
        f"Each expert at step {picked.step:,}",
        "Largest first, in units of the even share (line). Inside the grey band a difference is sampling noise.",
        plots.load_bars(here.frame, noise=float(noise.band(*shape)), expert=picked.expert, theme=theme),
        alt=f"Sorted expert loads; the largest is {here.frame['load_rel'].max():.2f} times the even share.",
        answer=here,
        key="load_bars",
    )
with right:
    groups = plots.river_groups(history.frame, keep=picked.expert)
    river = plots.load_river(groups, expert=picked.expert, theme=theme)
    draw(
        "Load river",
        "Shares of the seven experts that changed most, always in this order, and of all others. A band that widens "
        "takes over.",
        plots.alert_spans(river, mine, last_step=picked.step),
        alt="Stacked shares of assignments over steps.",
        answer=history,
        key="load_river",
    )
draw(
    "Every expert over time",
    "One row per expert: blue below the even share, orange above, × no token at all. Read along a row for births and "
    "deaths.",
    plots.load_time_map(history.frame, expert=picked.expert, theme=theme),
    alt=f"Heat map of the loads of {picked.width} experts over steps.",
    answer=history,
    key="load_time_map",
)
names = [name for name in METRICS if name in data.metric_names(picked)]
if names:
    view.keep_valid("metric", names, names[0])
    chosen = st.segmented_control(
        "Metric over time", names, key="metric", format_func=lambda at: METRICS[at][0], required=True
    )
    name = chosen or names[0]
    view.link("metric")
    label, meaning, limits = METRICS[name]
    series = data.until(data.ask(picked.path, picked.step, "metric_over_time", name=name, points=400), picked)
    curves = plots.metric_curves(
        series.frame,
        label=label,
        layer=picked.layer,
        floor=noise.floor(name, *shape),
        limits=limits,
        theme=theme,
    )
    draw(
        f"{label} of all layers",
        f"{meaning}. Orange: layer {picked.layer}. Dashed: what perfect balance would show with this many tokens. "
        "Shaded: alerts.",
        plots.alert_spans(curves, mine, last_step=picked.step),
        alt=f"{label} of every layer over steps.",
        answer=series,
        key="metric_curves",
    )
