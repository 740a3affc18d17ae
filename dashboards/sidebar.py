"""The sidebar: which run, which layer and expert, live or frozen at a step. Its widgets are the view of every page."""

from __future__ import annotations

import streamlit as st

from dashboards import data, view
from dashboards.components import duration, grouped
from dashboards.runs import asked_run, available
from moeviz.errors import MoevizError
from moeviz.records import ModelInfo
from moeviz.store.queries import step_range

STATUS_SECONDS = 2.0


class DenseRunError(MoevizError):
    """The chosen run has no layer to look at; beside others it has its losses."""


def pick_view() -> view.View:
    """Draw the sidebar and return what was picked.

    Raises:
        DenseRunError: the run has no MoE layer.
        MoevizError: no run, or one that cannot be read.
    """
    runs = available(asked_run())
    view.keep_valid("run", list(runs.paths), runs.first)
    with st.sidebar:
        name = st.selectbox("Run", list(runs.paths), key="run")
        path = str(runs.paths[name])
        info = data.run_store(path).info.model
        status(path)
        if not info.layers:
            view.link("run")
            raise DenseRunError(
                f"the run {name} records no MoE layer; train it with `moeviz train --log-routing`"
            )
        live, step = _when(path)
        layer, expert = _where(info)
    view.link("run", "layer", "expert", "live", *([] if live else ["step"]))
    return view.View(path=path, info=info, layer=layer, expert=expert, live=live, step=step)


@st.fragment(run_every=STATUS_SECONDS)
def status(path: str) -> None:
    """The run's state on every page, so that a frozen figure is never mistaken for a live one."""
    snapshot = data.live_run(path).feed.latest
    if snapshot is None:
        st.caption("reading the run …")
    elif snapshot.step < 0:
        st.caption("waiting for the first step")
    else:
        late = "" if snapshot.state == "live" else f" · last step {duration(snapshot.behind_seconds)} ago"
        st.caption(f"{snapshot.state} · step {grouped(snapshot.step)}{late}")


def _when(path: str) -> tuple[bool, int]:
    """Live, or frozen at a step of the run."""
    view.keep_valid("live", [True, False], True)
    live = st.toggle("Live", key="live", help="Off: every page shows the chosen step.")
    known = step_range(data.run_store(path)) or (-1, -1)
    if live or known[0] == known[1]:
        return live, known[1]
    step = min(max(st.session_state.get("step", known[1]), known[0]), known[1])
    st.session_state["step"] = step
    return live, st.slider("Step", *known, key="step")


def _where(info: ModelInfo) -> tuple[int, int | None]:
    """A layer, and one of its experts or none."""
    layers = list(range(info.num_layers))
    view.keep_valid("layer", layers, 0)
    layer = st.selectbox("Layer", layers, key="layer", format_func=lambda at: f"Layer {at}")
    experts = [None, *range(info.layers[layer].num_experts)]
    view.keep_valid("expert", experts, None)
    expert = st.selectbox(
        "Expert",
        experts,
        key="expert",
        format_func=lambda at: "any" if at is None else f"Expert {at}",
        placeholder="any",
    )
    return layer, expert
