"""What pages ask: cached questions to the store, one feed per run. Pages never see SQL, a path or a connection.

A question is cached together with the newest step it saw, so a live run is asked again only when it moved on.
"""

from __future__ import annotations

import atexit
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import streamlit as st

from dashboards import noise
from dashboards.components.load_map import load_map_data
from dashboards.frozen import frozen
from dashboards.view import View
from moeviz.live import Snapshot
from moeviz.store import queries
from moeviz.store.feed import RunFeed
from moeviz.store.reader import Store, open_run

_SAMPLES = 400
"""Sampled sequences to pick from, the newest ones."""


class Answer(NamedTuple):
    """A table and how it was asked for."""

    frame: pd.DataFrame
    asked: str
    """Python that gives the same table."""


@st.cache_resource(max_entries=8, show_spinner=False, on_release=lambda store: store.close())
def run_store(path: str) -> Store:
    """The run, opened once for all sessions. Raises MoevizError when it cannot be opened."""
    store = open_run(path)
    atexit.register(store.close)  # or the interpreter ends with a page of complaints about open connections
    return store


def ask(path: str, upto: int | None, question: str, **arguments: Any) -> Answer:
    """Ask `moeviz.store.queries.QUESTION`; cached until `upto`, the newest step, moves."""
    shown = ", ".join(["run", *(f"{name}={value!r}" for name, value in arguments.items())])
    return Answer(_ask(path, upto, question, tuple(arguments.items())), f"queries.{question}({shown})")


@st.cache_data(max_entries=128, show_spinner=False)
def _ask(path: str, upto: int | None, question: str, arguments: tuple[tuple[str, Any], ...]) -> pd.DataFrame:
    return getattr(queries, question)(run_store(path), **dict(arguments))


class LiveRun:
    """The feed of one run, and the packed map of its newest revision: made once, whoever looks."""

    def __init__(self, path: str) -> None:
        self.feed = RunFeed(path)
        self.feed.poll()  # so that the first page, and a frozen one, need not wait for the thread
        self.feed.start()
        self._made: tuple[Snapshot | None, dict[str, Any]] = (None, {})

    def map_data(self, snapshot: Snapshot) -> dict[str, Any]:
        """`load_map_data`, again only for a snapshot of another revision."""
        last, packed = self._made
        if last is None or (last.step, last.revision) != (snapshot.step, snapshot.revision):
            packed = load_map_data(snapshot)
            self._made = (snapshot, packed)
        return packed


@st.cache_resource(max_entries=8, show_spinner=False, on_release=lambda run: run.feed.stop())
def live_run(path: str) -> LiveRun:
    """One thread per run polls its folder; sessions and fragments only read its latest snapshot."""
    run = LiveRun(path)
    atexit.register(run.feed.stop)
    return run


def snapshot(run: LiveRun, picked: View) -> Snapshot | None:
    """The newest snapshot of a live view, the one of the chosen step of a frozen view."""
    latest = run.feed.latest
    if latest is None or picked.live or latest.step == picked.step:
        return latest
    return _frozen(picked.path, picked.step)


@st.cache_data(max_entries=16, show_spinner=False)
def _frozen(path: str, step: int) -> Snapshot:
    latest = live_run(path).feed.latest
    assert latest is not None
    return frozen(run_store(path), latest, step)


def metric_names(picked: View) -> list[str]:
    return _metric_names(picked.path, picked.step)


@st.cache_data(max_entries=32, show_spinner=False)
def _metric_names(path: str, upto: int) -> list[str]:
    return queries.metric_names(run_store(path))


def design_effect(picked: View) -> float:
    """How alike the tokens of a sequence are in the view's layer, as the run estimated it last; else the default."""
    if "design_effect" not in metric_names(picked):
        return noise.DESIGN_EFFECT
    found = ask(picked.path, picked.step, "metric_over_time", name="design_effect", layer=picked.layer)
    values = until(found, picked).frame["value"]
    return float(values.iloc[-1]) if len(values) else noise.DESIGN_EFFECT


@st.cache_data(max_entries=32, show_spinner=False)
def trace(path: str, step: int, seq: int, rank: int) -> queries.TraceArrays:
    """One sampled sequence through all layers; it never changes once written."""
    return queries.trace_arrays(run_store(path), step, seq, rank)


def samples(picked: View) -> Answer:
    """Sampled sequences up to the view's step, newest first."""
    found = ask(picked.path, picked.step, "sequences", last=_SAMPLES)
    return found._replace(frame=found.frame[found.frame["step"] <= picked.step])


def attention_maps(path: str, step: int, seq: int, index: pd.DataFrame) -> dict[tuple[int, int], np.ndarray]:
    """(block, head) -> weights [Q, C] of every recorded head of one sequence.

    Args:
        index: rows of `attention_index` of this step and sequence.
    """
    places = [(int(row.layer), int(row.head)) for row in index.itertuples()]
    found = {place: _attention_map(path, step, *place, seq) for place in places}
    return {place: weights for place, weights in found.items() if weights is not None}


@st.cache_data(max_entries=512, show_spinner=False)
def _attention_map(path: str, step: int, layer: int, head: int, seq: int) -> np.ndarray | None:
    return queries.attention_map(run_store(path), step, layer, head, seq)


def attention_answer(weights_QC: np.ndarray, step: int, layer: int, head: int, seq: int) -> Answer:
    """An attention map as a table: query, key, weight; only weights above 0."""
    query, key = np.nonzero(weights_QC)
    frame = pd.DataFrame({"query": query, "key": key, "weight": weights_QC[query, key]})
    return Answer(frame, f"queries.attention_map(run, {step=}, {layer=}, {head=}, {seq=})")


@st.cache_data(max_entries=64, show_spinner=False)
def latents(path: str, step: int, layer: int, name: str) -> queries.LatentArrays | None:
    """The latents of one block at one step (see `queries.latent_arrays`); they never change once written."""
    return queries.latent_arrays(run_store(path), step, layer, name)


def latent_heads(picked: View, index: pd.DataFrame) -> list[int]:
    """Query heads whose slots were recorded; empty where all heads share a latent."""
    rows = index[index["name"] == "write"]
    if rows.empty:
        return []
    found = latents(picked.path, int(rows["step"].iloc[-1]), int(rows["layer"].iloc[-1]), "write")
    return [] if found is None else [head for head in found.heads_X if head is not None]


def latent_answer(grid_SC: np.ndarray, step: int, layer: int, name: str) -> Answer:
    """A picture of latents as a table: row (token, or block of tokens), place, value."""
    row, place = np.indices(grid_SC.shape).reshape(2, -1)
    frame = pd.DataFrame({"row": row, "place": place, "value": grid_SC.ravel()})
    return Answer(frame, f"queries.latent_arrays(run, {step=}, {layer=}, {name=}).grid_XSC")


def coactivation(picked: View, first: int, last: int) -> Answer:
    """Pairs of experts of the view's layer that share tokens: expert, other, count, share, lift; none for top-1."""
    if picked.top_k < 2:
        return Answer(pd.DataFrame(), "")
    asked = f"queries.coactivation(run, layer={picked.layer}, {first=}, {last=})  # tokens of each pair"
    return Answer(_coactivation(picked.path, picked.step, picked.layer, picked.top_k, first, last), asked)


@st.cache_data(max_entries=32, show_spinner=False)
def _coactivation(path: str, upto: int, layer: int, top_k: int, first: int, last: int) -> pd.DataFrame:
    from moeviz.plots.experts import coactivation_rows  # the live page must not load plotly

    counts_EE = queries.coactivation(run_store(path), layer, first, last)
    return coactivation_rows(counts_EE, top_k)


def until(answer: Answer, picked: View) -> Answer:
    """Only rows up to the view's step."""
    return answer._replace(frame=answer.frame[answer.frame["step"] <= picked.step])


def sample_name(row: Any) -> str:
    """How a sampled sequence is called in a list: number, domain, length, loss."""
    parts = [f"sequence {row.seq}" if row.rank == 0 else f"rank {row.rank}, sequence {row.seq}"]
    parts += [str(row.domain)] if isinstance(row.domain, str) else []
    parts += [f"{row.n_tokens:,} tokens"]
    parts += [f"loss {row.mean_loss:.2f}"] if pd.notna(row.mean_loss) else []
    return " · ".join(parts)


def sequence_names(path: str, step: int, seqs: list[int]) -> dict[int, str]:
    """The same for the sequences of attention maps, of which only the number is known unless their text was sampled."""
    rows = ask(path, step, "sequences", last=_SAMPLES).frame
    known = {row.seq: sample_name(row) for row in rows[rows["step"] == step].itertuples() if row.rank == 0}
    return {seq: known.get(seq, f"sequence {seq}") for seq in seqs}
