"""Pages draw the fixed probe where a run has one, and leave it out where it has none."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import streamlit as st
from dashboards_run import E, K, L, SyntheticRun
from test_dashboards_pages import opened, plots_of, titles

from moeviz.plots import domain_time_map, saturation_curves
from moeviz.records import ProbeRecord, SequenceRecord, TokenRoutingRecord
from moeviz.store import open_run, queries

STEPS, LAYER, EXPERT, LENGTH = 31, 2, 3, 12
DOMAINS = ("code",) * 12 + ("prose",) * 12


def a_pass(step: int) -> ProbeRecord:
    """Decisions that settle, and an expert of one layer that comes to take all of one domain."""
    rng = np.random.default_rng(4)
    moved = np.random.default_rng(100 + step)
    scores = rng.random((L, len(DOMAINS), LENGTH, E)) + moved.random((L, len(DOMAINS), LENGTH, E)) / (
        1 + step
    )
    if step >= 20:
        scores[LAYER, :12, :, EXPERT] = 9
        scores[LAYER, 12:, :, EXPERT] = -9
    seqs, lengths_N = np.arange(len(DOMAINS)), np.full(len(DOMAINS), LENGTH)
    ids_LNSK = (-scores).argsort(-1)[..., :K].astype(np.uint16)
    return ProbeRecord(
        step=step,
        rank=0,
        sequences=SequenceRecord(
            step=step,
            rank=0,
            seqs=seqs,
            token_ids_NS=np.zeros((len(DOMAINS), LENGTH), dtype=np.int32),
            lengths_N=lengths_N,
            domains=DOMAINS,
        ),
        routings=(
            TokenRoutingRecord(
                step=step,
                rank=0,
                layers=np.arange(L),
                seqs=seqs,
                experts_LNSK=ids_LNSK,
                weights_LNSK=np.full(ids_LNSK.shape, 0.5, dtype=np.float32),
                lengths_N=lengths_N,
            ),
        ),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in ("plain", "probed"):
        path = tmp_path_factory.mktemp("probe") / name
        run = SyntheticRun(path, planned_steps=60)
        run.write_all(STEPS)
        for step in (0, 10, 20, 30, 31) if name == "probed" else ():
            run.writer.write(a_pass(step))
        run.finish(STEPS - 1)
        made[name] = path
    return made


@pytest.fixture(autouse=True, scope="module")
def closed_runs() -> Iterator[None]:
    yield
    st.cache_resource.clear()
    st.cache_data.clear()


def test_loads_page_shows_how_settled_routing_is(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = opened(runs["probed"], monkeypatch, "loads", layer=str(LAYER))
    assert "How settled its routing is" in titles(app)
    curves = plots_of(app)[titles(app).index("How settled its routing is")]
    assert [trace["name"] for trace in curves["data"]][-3:] == [
        f"layer {LAYER}",
        "first choices alone",
        "by chance",
    ]
    plain = opened(runs["plain"], monkeypatch, "loads", layer=str(LAYER))
    assert "How settled its routing is" not in titles(plain)


def test_experts_page_shows_domains_over_training(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = opened(runs["probed"], monkeypatch, "experts", layer=str(LAYER), expert=str(EXPERT))
    assert titles(app)[1] == "Domains over training"
    assert "moeviz analyze RUN" not in [code.value for code in app.code]


def test_a_frozen_view_knows_no_later_pass(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    app = opened(runs["probed"], monkeypatch, "loads", layer=str(LAYER), step="19", live="0")
    curves = plots_of(app)[titles(app).index("How settled its routing is")]
    steps = base64.b64decode(curves["data"][-1]["x"]["bdata"])
    assert [*steps] == [0, 10, 20], "the last one is of the weights after step 19"


def test_what_chance_explains_is_faint(runs: dict[str, Path]) -> None:
    with open_run(runs["probed"]) as store:
        rows = queries.probe_domains(store, LAYER)
    mine = rows[rows["expert"] == EXPERT]
    figure = json.loads(domain_time_map(mine).to_json())
    assert [trace["y"] for trace in figure["data"]] == [["code", "prose"]] * 2
    late = mine[mine["step"] == 31].set_index("domain")
    assert late["share"].to_dict() == {"code": 1.0, "prose": 0.0}
    assert not late["hidden"].any()
    assert mine[mine["step"] == 0]["hidden"].all()
    bright = np.isfinite(np.array(domain_time_map(mine).data[1].z, dtype=float))
    assert bright.tolist() == [[False, False, True, True, True]] * 2


def test_curves_end_at_one_and_put_the_layer_in_front(runs: dict[str, Path]) -> None:
    with open_run(runs["probed"]) as store:
        rows = queries.probe_saturation(store)
    figure = saturation_curves(rows, layer=LAYER)
    layers = list(figure.data)[:L]
    assert [trace.name for trace in layers[:-1]] == ["other layers"] * (L - 1)
    assert all(trace.y[-1] == 1 for trace in layers)
