"""The latents page draws what was recorded of either kind, and says what to do where nothing was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import streamlit as st
from latent_runs import MLA_BLOCK, SLOT_BLOCK, STEPS, TEXTS, records_of, write_run
from streamlit.testing.v1 import AppTest
from test_dashboards_pages import link_of, opened

from dashboards.components.latent_words import PARTS, has_none, where_words
from moeviz.records import LatentInfo, ModelInfo


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "latents"
    write_run(path)
    return path


@pytest.fixture(autouse=True, scope="module")
def closed_runs() -> Iterator[None]:
    yield
    st.cache_resource.clear()
    st.cache_data.clear()


def plot(app: AppTest, at: int) -> dict:
    return json.loads(app.get("plotly_chart")[at].proto.spec)


def numbers(values: object) -> np.ndarray:
    """What plotly packs as base64, or a plain list."""
    if isinstance(values, dict):
        import base64

        shape = [int(size) for size in str(values.get("shape", "")).split(",") if size.strip()]
        array = np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"])
        return array.reshape(shape) if shape else array
    return np.array(values, dtype=float)


def test_mla_shows_the_recorded_latents(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = opened(run, monkeypatch, "latents", block=str(MLA_BLOCK), map="10")
    assert not app.error
    record = records_of(10)[0]
    tiles = {metric.label: metric.value for metric in app.metric}
    assert tiles["Latent dimensions (entropy)"] == f"{record.values['latent_erank']:.1f} of 10"
    picture = plot(app, 2)["data"][0]
    span = np.ptp(record.grid_XSC)
    assert np.abs(numbers(picture["z"]) - record.grid_XSC[0]).max() <= span / 510 + 1e-6
    assert "foxes 5" in plot(app, 2)["layout"]["yaxis"]["ticktext"]
    assert "&lt;b> 3" in plot(app, 2)["layout"]["yaxis"]["ticktext"]
    assert any("Fewer than ten tokens" in caption.value for caption in app.caption)


def test_the_link_restores_block_step_and_part(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = opened(run, monkeypatch, "latents", block=str(MLA_BLOCK), map="0", part="q")
    assert any(text.value == "###### Queries: sequence 2" for text in app.markdown)
    assert link_of(app)["part"] == "q"
    assert link_of(app)["map"] == "0"


def test_slots_show_both_stages_of_the_chosen_head(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = opened(run, monkeypatch, "latents", block=str(SLOT_BLOCK), map=str(STEPS[-1]), head="3")
    headings = [text.value for text in app.markdown]
    assert "###### Slots read tokens, head 1: sequence 2" in headings  # query heads 2 and 3 share key head 1
    assert "###### Tokens read slots, head 3: sequence 2" in headings
    _, _, read, write = records_of(STEPS[-1])
    assert plot(app, 3)["layout"]["yaxis"]["ticktext"][:2] == ["↵ 2", "&lt;b> 3"]  # after the first chunk
    shown = numbers(plot(app, 3)["data"][0]["z"])
    np.testing.assert_allclose(shown, write.grid_XSC[3], atol=1 / 500)
    compared = 2.0 ** numbers(plot(app, 2)["data"][0]["z"]) / len(TEXTS)
    inside = (read.grid_XSC[1] > 0.03) & (read.grid_XSC[1] < 0.9)
    np.testing.assert_allclose(compared[inside], read.grid_XSC[1][inside], atol=1 / 400)


def test_nothing_recorded_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "empty", latents=False)
    app = opened(tmp_path / "empty", monkeypatch, "latents")
    assert any("No latents were recorded" in text.value for text in app.markdown)
    assert "--latent-every" in app.code[0].value
    what, command = has_none(ModelInfo(family="x", layers=()))
    assert "has no latents" in what
    assert "demo-mla" in command
    assert "demo-slots" in command


def test_few_tokens_are_said_aloud() -> None:
    info = LatentInfo(layer=2, name="x", kind="mla", width=48, num_heads=4)
    assert "Fewer than ten" not in where_words(info, 5, 480)
    assert "Fewer than ten" in where_words(info, 5, 479)
    assert set(PARTS) == {"kv", "q", "read", "write"}
