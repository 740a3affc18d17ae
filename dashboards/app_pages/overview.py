"""How the run fares now: the live page."""

from __future__ import annotations

import streamlit as st

from dashboards import data, view
from dashboards.components.alerts import alerts
from dashboards.components.header import header
from dashboards.components.load_map import load_map
from dashboards.figure import card, data_behind, empty

REFRESH_SECONDS = 1.0
picked = view.current()


@st.fragment(run_every=REFRESH_SECONDS if picked.live else None)
def now() -> None:
    run = data.live_run(picked.path)
    snapshot = data.snapshot(run, picked)
    if snapshot is None or snapshot.step < 0:
        empty("Waiting for the first step of this run", "moeviz train --log-routing")
        return
    header(snapshot)
    with card(
        "Expert load and load entropy, layer by layer",
        "Left: the load of each expert against the even share; even cells fade into the card. Right: entropy of the "
        "load over its maximum, recent steps; a row that sinks and glows is a layer that collapses.",
        "map",
    ):
        load_map(run.map_data(snapshot), picked.layer, picked.expert, view.select("load_map", "cell"))
        data_behind(lambda: data.ask(picked.path, snapshot.step, "load_matrix", step=snapshot.step), "loads")
    with card(
        "Alerts",
        "One row per episode, worst first: what happened, where, and what to do. Press one to select its layer.",
        "alerts",
    ):
        alerts(snapshot, view.select("alerts", "cell"))


now()
