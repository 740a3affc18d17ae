"""Pickers of single pages that take more than a line: which layers to join, which pair to look at, which domain."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd
import streamlit as st

from dashboards import view
from moeviz.metrics import METRICS, Metric, by_id

MOST_LAYERS, FIRST_LAYERS = 6, 4
LIFTS = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
ALL_DOMAINS = "all"
FIRST_METRIC = "load_entropy"


class Paths(NamedTuple):
    """What the flow page was asked for."""

    layers: tuple[int, ...]
    """Layers to join, ascending; may be fewer than two."""
    min_lift: float
    domain: str | None
    """None for all domains."""


def pick_paths(num_layers: int, domains: list[str]) -> Paths:
    """Layers, lift and domain in one row."""
    left, middle, right = st.columns([3, 2, 2])
    layers = list(range(num_layers))
    view.keep_valid_many("layers", layers, spread(layers, FIRST_LAYERS))
    chosen = left.multiselect(
        "Layers", layers, key="layers", max_selections=MOST_LAYERS, format_func=lambda at: f"L{at}"
    )
    view.keep_valid("lift", LIFTS, 1.5)
    lift = middle.select_slider(
        "Show links from", LIFTS, key="lift", format_func=lambda at: f"{at:g}× chance"
    )
    with right:
        domain = pick_domain(domains)
    view.link("layers", "lift", "domain")
    return Paths(tuple(sorted(chosen)), lift, domain)


def pick_pair(layers: tuple[int, ...]) -> tuple[int, int]:
    """Two successive ones of `layers`."""
    pairs = {f"{a}-{b}": (a, b) for a, b in pairwise(layers)}
    names = list(pairs)
    view.keep_valid("pair", names, names[0])
    name = st.segmented_control(
        "Pair of layers",
        names,
        key="pair",
        format_func=lambda at: "L{} → L{}".format(*pairs[at]),
        required=True,
    )
    view.link("pair")
    return pairs[name or names[0]]


def pick_domain(domains: list[str]) -> str | None:
    """One domain of the training mixture, None for all of them."""
    options = [ALL_DOMAINS, *domains]
    view.keep_valid("domain", options, ALL_DOMAINS)
    domain = st.selectbox("Domain", options, key="domain")
    return None if domain == ALL_DOMAINS else domain


def pick_metric(recorded: list[str]) -> Metric | None:
    """One of the metrics that the run recorded and the glossary explains; None when there is none."""
    ids = [metric.id for metric in METRICS if metric.id in set(recorded)]
    if not ids:
        return None
    view.keep_valid("metric", ids, FIRST_METRIC if FIRST_METRIC in ids else ids[0])
    chosen = st.selectbox(
        "Metric over time",
        ids,
        key="metric",
        format_func=lambda id: by_id(id).name,
        help=by_id(st.session_state["metric"]).help,
    )
    view.link("metric")
    return by_id(chosen)


def domains_of(samples: pd.DataFrame) -> list[str]:
    """Domains of sampled sequences, sorted; empty where none was recorded."""
    return sorted(samples["domain"].dropna().unique().tolist())


def spread(items: list[int], count: int) -> list[int]:
    """`count` of them at even distances, the first and the last included."""
    at = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[index] for index in at]
