"""The page of one expert draws what the run holds, and says what to do where it holds less."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import streamlit as st
from dashboards_run import E, SyntheticRun
from test_dashboards_pages import opened, plots_of, titles

from moeviz.plots import coactivation_rows, domain_bars, token_lifts
from moeviz.plots.experts import visible
from moeviz.plots.importance import knockout_bars, knockout_rows
from moeviz.records import AnalysisRecord, AnalysisValue
from moeviz.store import open_run, queries

STEPS, LAYER, EXPERT = 41, 2, 5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run with an analysis and one without."""
    made = {}
    for name in ("plain", "analysed", "removed"):
        path = tmp_path_factory.mktemp("experts") / name
        writer = SyntheticRun(path, planned_steps=60)
        writer.write_all(STEPS)
        if name != "plain":
            removed = tuple(removals()) if name == "removed" else ()
            writer.writer.write(AnalysisRecord(step=0, values=(*domain_values(), *removed)))
        writer.finish(STEPS - 1)
        made[name] = path
    return made


def domain_values() -> Iterator[AnalysisValue]:
    for expert in range(E):
        for name, value in (("code", 0.5), ("stories", 0.13)):
            yield AnalysisValue(
                part="expert", layer=LAYER, index=expert, name="domain_spec", value=value,
                null_mean=0.125, null_sd=0.02, label=name,
            )  # fmt: skip


def removals() -> Iterator[AnalysisValue]:
    """Expert 5 matters for code, expert 1 for nothing; the two ways to take it out differ."""
    for expert, effect in ((1, 0.001), (EXPERT, 0.2)):
        for mode, factor in (("reroute", 0.5), ("zero", 1.0)):
            for label, share in (("stories", 0.1), ("all", 1.0), ("code", 2.0)):
                yield AnalysisValue(
                    part="expert", layer=LAYER, index=expert, name=f"knockout_{mode}",
                    value=effect * factor * share, null_mean=0.0, null_sd=0.03, label=label,
                )  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def closed_runs() -> Iterator[None]:
    yield
    st.cache_resource.clear()
    st.cache_data.clear()


def test_page_shows_the_chosen_expert(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    app = opened(runs["analysed"], monkeypatch, "experts", layer=str(LAYER), expert=str(EXPERT))
    assert app.header[0].value == f"Expert {EXPERT} of layer {LAYER}"
    assert titles(app) == [
        "Tokens it takes beyond its share",
        "Domains",
        "Its load over time",
        f"Who works with whom in layer {LAYER}",
    ]
    tokens, domains = plots_of(app)[:2]
    with open_run(runs["analysed"]) as store:
        expected = queries.expert_tokens(store, LAYER, EXPERT, 16)
    assert tokens["data"][0]["y"][0].startswith(visible(expected["text"][0]))
    assert domains["data"][0]["y"] == ["code", "stories"]


def test_page_shows_what_the_model_loses_without_the_expert(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = opened(runs["removed"], monkeypatch, "experts", layer=str(LAYER), expert=str(EXPERT))
    shown = dict(zip(titles(app), plots_of(app), strict=True))
    mine = shown[f"What the model loses without expert {EXPERT}"]["data"]
    assert [bars["name"] for bars in mine] == ["the next expert takes over", "nothing takes its place"]
    for bars, factor in zip(mine, (0.5, 1.0), strict=True):
        assert bars["y"] == ["all", "code", "stories"]
        np.testing.assert_allclose(decoded(bars["x"]), np.array([0.2, 0.4, 0.02]) * factor)
        np.testing.assert_allclose(decoded(bars["error_x"]["array"]), 0.06)
    whole = shown[f"... and without each expert of layer {LAYER}"]["data"]
    assert whole[0]["y"] == [f"expert {EXPERT}", "expert 1"]


def test_an_effect_within_two_standard_errors_is_faint(runs: dict[str, Path]) -> None:
    with open_run(runs["removed"]) as store:
        found = queries.analysis(store, part="expert", layer=LAYER)
    rows = knockout_rows(found[found["label"] == "all"], "unit")
    assert rows["unit"].tolist() == [EXPERT, EXPERT, 1, 1]
    assert rows["noise"].tolist() == [False, False, True, True]
    figure = json.loads(knockout_bars(found[found["label"] == "all"], by="unit").to_json())
    strong, faint = (
        float(color.rstrip(")").rsplit(",", 1)[1]) for color in figure["data"][0]["marker"]["color"]
    )
    assert strong > 2 * faint


def test_without_knockouts_the_page_says_how_to_get_them(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = opened(runs["analysed"], monkeypatch, "experts", layer=str(LAYER), expert=str(EXPERT))
    assert any("--knockout" in one.value for one in app.caption)


def decoded(values: object) -> np.ndarray:
    """Numbers of a figure as JSON: a list, or plotly's base64 of an array."""
    if isinstance(values, dict):
        return np.frombuffer(b64decode(values["bdata"]), dtype=values["dtype"])
    return np.asarray(values)


def test_page_names_the_command_without_an_analysis(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = opened(runs["plain"], monkeypatch, "experts", layer=str(LAYER), expert=str(EXPERT))
    assert "Domains" not in titles(app)
    assert "moeviz analyze RUN" in [code.value for code in app.code]


def test_without_a_choice_the_busiest_is_shown(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = opened(runs["plain"], monkeypatch, "experts", layer=str(LAYER))
    with open_run(runs["plain"]) as store:
        loads = queries.load_matrix(store)
    here = loads[loads["layer"] == LAYER]
    busiest = here.loc[here["count"].idxmax(), "expert"]
    assert app.header[0].value == f"Expert {busiest} of layer {LAYER}"


def test_random_routing_has_lift_one() -> None:
    rng = np.random.default_rng(0)
    num_tokens, num_experts, top_k = 40_000, 6, 3
    ids_TK = rng.random((num_tokens, num_experts)).argsort(axis=1)[:, :top_k]
    active_TE = np.zeros((num_tokens, num_experts), dtype=np.int64)
    np.put_along_axis(active_TE, ids_TK, 1, axis=1)
    rows = coactivation_rows(active_TE.T @ active_TE, top_k)
    assert len(rows) == num_experts * (num_experts - 1)
    np.testing.assert_allclose(rows["lift"], 1, atol=0.03)
    np.testing.assert_allclose(rows.groupby("expert")["share"].sum(), top_k - 1)


def test_a_bar_that_chance_explains_is_faint(runs: dict[str, Path]) -> None:
    with open_run(runs["analysed"]) as store:
        found = queries.analysis(store, part="expert", layer=LAYER)
    figure = json.loads(domain_bars(found[found["unit"] == EXPERT]).to_json())
    strong, faint = (
        float(color.rstrip(")").rsplit(",", 1)[1]) for color in figure["data"][0]["marker"]["color"]
    )
    assert strong > 2 * faint


def test_token_names_are_no_markup(runs: dict[str, Path]) -> None:
    with open_run(runs["analysed"]) as store:
        frame = queries.expert_tokens(store, LAYER, EXPERT, 3)
    frame["text"] = ["<b>x</b>", " a", "\n"]
    names = json.loads(token_lifts(frame).to_json())["data"][0]["y"]
    assert names[0].startswith("&lt;b&gt;")
    assert names[1].startswith("␣a")
    assert names[2].startswith("⏎")
