"""Pickers of single pages that take more than a line: which layers to join, which pair to look at, which domain."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd
import streamlit as st

from dashboards import view
from dashboards.components.latent_words import PARTS, parts_of
from moeviz.metrics import GROUPS, METRICS, Metric, by_id
from moeviz.records import LatentInfo, ModelInfo

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

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


class Latents(NamedTuple):
    """What the latents page was asked for."""

    info: LatentInfo
    step: int
    part: str
    """kv, q, read or write."""
    head: int | None
    """Query head of two-stage attention; None where all heads share the latent."""
    tokens: int
    """Tokens that its numbers come from."""

    def head_at(self, heads_X: tuple[int | None, ...], name: str) -> int:
        """Place of the head among those of a part: of `read`, the key head that the query head uses."""
        if self.head is None or None in heads_X:
            return 0
        wanted = self.head * len(heads_X) // max(self.info.num_heads, 1) if name == "read" else self.head
        return heads_X.index(wanted) if wanted in heads_X else 0


def pick_latents(index: pd.DataFrame, info: ModelInfo, heads: list[int]) -> Latents:
    """Step, block and what to look at, in one row. `index` are the rows of `latent_index`, at least one."""
    first, second, third, fourth = st.columns([2, 2, 4, 3])
    steps = sorted(index["step"].unique().tolist(), reverse=True)
    view.keep_valid("map", steps, steps[0])
    step = first.selectbox("Recorded at step", steps, key="map", format_func=lambda at: f"{at:,}")
    here = index[index["step"] == step]
    blocks = sorted(here["layer"].unique().tolist())
    view.keep_valid("block", blocks, blocks[-1])
    block = second.selectbox("Block", blocks, key="block", format_func=lambda at: f"block {at}")
    known = {each.layer: each for each in info.latents}
    names = set(here[here["layer"] == block]["name"])
    kind: Literal["mla", "two-stage"] = "mla" if "kv" in names else "two-stage"
    chosen = known.get(block) or LatentInfo(layer=block, name="", kind=kind, width=0, num_heads=0)
    parts = [name for name in parts_of(kind) if name in names]
    view.keep_valid("part", parts, parts[-1] if kind == "two-stage" else parts[0])
    part = third.segmented_control(
        "Latents", parts, key="part", format_func=lambda name: PARTS[name].title, required=True
    )
    view.link("map", "block", "part")
    head = None if kind == "mla" else _pick_head(fourth, heads)
    return Latents(chosen, step, part or parts[0], head, _tokens(here, block, part or parts[0]))


def _tokens(index: pd.DataFrame, block: int, name: str) -> int:
    return int(index[(index["layer"] == block) & (index["name"] == name)]["tokens"].max())


def _pick_head(place: DeltaGenerator, heads: list[int]) -> int:
    view.keep_valid("head", heads, heads[0])
    head = place.segmented_control(
        "Query head", heads, key="head", format_func=lambda at: f"head {at}", required=True
    )
    view.link("head")
    return heads[0] if head is None else head


def pick_measure(metrics: pd.DataFrame) -> Metric | None:
    """One of the recorded quantities about latents; None when there is none."""
    recorded = set(metrics["name"])
    ids = [metric.id for metric in GROUPS["latent attention"] if metric.id in recorded]
    if not ids:
        return None
    first = next((id for id in ids if id in ("latent_erank", "slot_n_eff")), ids[0])
    view.keep_valid("measure", ids, first)
    chosen = st.selectbox("Over training", ids, key="measure", format_func=lambda id: by_id(id).name)
    view.link("measure")
    return by_id(chosen)


def pick_domain(domains: list[str]) -> str | None:
    """One domain of the training mixture, None for all of them."""
    options = [ALL_DOMAINS, *domains]
    view.keep_valid("domain", options, ALL_DOMAINS)
    domain = st.selectbox("Domain", options, key="domain")
    return None if domain == ALL_DOMAINS else domain


def pick_metric(recorded: list[str]) -> Metric | None:
    """One of the metrics that the run recorded and the glossary explains; None when there is none."""
    of_blocks = {
        metric.id for metric in GROUPS["latent attention"]
    }  # their layers are blocks; a page of their own
    ids = [metric.id for metric in METRICS if metric.id in set(recorded) - of_blocks]
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
