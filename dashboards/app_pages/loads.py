"""One layer over time: who takes over, when, and whether it is more than noise."""

from __future__ import annotations

import streamlit as st

from dashboards import data, noise, view
from dashboards.figure import draw, empty
from dashboards.pickers import pick_metric
from moeviz import plots

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
even_band = float(noise.band(*shape, data.design_effect(picked)))

left, right = st.columns([2, 3])
with left:
    draw(
        f"Each expert at step {picked.step:,}",
        "Largest first, in units of the even share (line). Inside the grey band a difference is sampling noise.",
        plots.load_bars(here.frame, noise=even_band, expert=picked.expert, theme=theme),
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
settled = data.ask(picked.path, picked.step, "probe_saturation", last=picked.step + 1)
if settled.frame["step"].nunique() > 1:
    draw(
        "How settled its routing is",
        "Share of the choices about a fixed set of held-out tokens that the newest weights make too. Steep near the "
        "end: tokens still change experts. Orange: this layer; dashed: random routing.",
        plots.saturation_curves(settled.frame, layer=picked.layer, theme=theme),
        alt="Router saturation of every layer over steps.",
        answer=settled,
        key="saturation",
    )
one = pick_metric(data.metric_names(picked))
if one is not None:
    series = data.until(
        data.ask(picked.path, picked.step, "metric_over_time", name=one.id, points=400), picked
    )
    floor, limits = noise.floor(one.id, *shape), (0.0, 1.02) if one.unit.startswith("fraction") else None
    curves = plots.metric_curves(
        series.frame, label=one.unit, layer=picked.layer, floor=floor, limits=limits, theme=theme
    )
    draw(
        f"{one.name} of all layers",
        f"{one.how_to_read} Even to collapsed: {one.range}. Orange: layer {picked.layer}; dashed: perfect balance with "
        "this many tokens; shaded: alerts.",
        plots.alert_spans(curves, mine, last_step=picked.step),
        alt=f"{one.name} of every layer over steps.",
        answer=series,
        key="metric_curves",
    )
