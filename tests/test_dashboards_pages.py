"""Every page draws, links restore their view, empty and damaged runs say what to do: Streamlit's own test runner."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import streamlit as st
from dashboards_run import COLLAPSING, E, SyntheticRun, model_info
from streamlit.testing.v1 import AppTest

from moeviz.metrics import by_id
from moeviz.records import ModelInfo
from moeviz.store.run import RunInfo, create_run

STEPS, PLANNED = 56, 60
PAGES = ("overview", "loads", "experts", "tokens", "flow", "attention")


def app_file() -> Path:
    spec = importlib.util.find_spec("dashboards")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "app.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "fox"
    writer = SyntheticRun(path, planned_steps=PLANNED)
    writer.write_all(STEPS)
    writer.finish(STEPS - 1)
    return path


@pytest.fixture(autouse=True, scope="module")
def closed_runs() -> Iterator[None]:
    """Stop the feeds that pages started."""
    yield
    st.cache_resource.clear()
    st.cache_data.clear()


def opened(run: Path, monkeypatch: pytest.MonkeyPatch, page: str = "overview", /, **link: str) -> AppTest:
    monkeypatch.setenv("MOEVIZ_RUN", str(run))
    app = AppTest.from_file(str(app_file()), default_timeout=240)
    for name, value in link.items():
        app.query_params[name] = value
    app.run()
    if page != "overview":
        app.switch_page(f"app_pages/{page}.py")
        for name, value in link.items():
            app.query_params[name] = value
        app.run()
    assert not app.exception, [error.message for error in app.exception]
    return app


def titles(app: AppTest) -> list[str]:
    return [text.value.removeprefix("###### ") for text in app.markdown if text.value.startswith("###### ")]


def link_of(app: AppTest) -> dict[str, str]:
    return {name: value[0] if isinstance(value, list) else value for name, value in app.query_params.items()}


def plots_of(app: AppTest) -> list[dict]:
    return [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]


@pytest.mark.parametrize("page", PAGES)
def test_page_draws_without_an_error(run: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    app = opened(run, monkeypatch, page)
    assert not app.error
    assert titles(app)
    captions = [text.value for text in app.caption]
    assert all(any(len(caption) > 30 for caption in captions) for _ in titles(app)), (
        "every card says how to read it"
    )


def test_overview_mounts_its_three_drawings(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = opened(run, monkeypatch)
    assert titles(app) == ["Expert load and load entropy, layer by layer", "Alerts"]
    mounted = [element.proto.component_name for element in app.get("bidi_component")]
    assert mounted == ["moeviz_header", "moeviz_load_map", "moeviz_alerts"]


def test_a_link_restores_the_view(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = opened(
        run, monkeypatch, "loads", layer=str(COLLAPSING), expert="9", live="0", step="40", metric="n_eff"
    )
    assert app.header[0].value == f"Loads of layer {COLLAPSING}"
    assert "Each expert at step 40" in titles(app)
    assert "Effective experts of all layers" in titles(app)
    assert app.selectbox(key="metric").help == by_id("n_eff").help
    assert app.session_state["expert"] == 9
    assert link_of(app) == {
        "run": "fox",
        "layer": "3",
        "expert": "9",
        "live": "0",
        "step": "40",
        "metric": "n_eff",
    }


@pytest.mark.parametrize(
    "link",
    [{"layer": "99"}, {"layer": "x"}, {"expert": "-4"}, {"step": "1e9", "live": "0"}, {"run": "../../etc"}],
)
def test_a_link_that_makes_no_sense_falls_back(
    run: Path, monkeypatch: pytest.MonkeyPatch, link: dict[str, str]
) -> None:
    app = opened(run, monkeypatch, **link)
    assert link_of(app)["run"] == "fox"
    assert link_of(app)["layer"] == "0"
    assert "expert" not in link_of(app)


def test_picking_a_layer_writes_the_link(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = opened(run, monkeypatch)
    app.sidebar.selectbox(key="layer").select(2).run()
    app.sidebar.selectbox(key="expert").select(7).run()
    assert link_of(app) == {"run": "fox", "layer": "2", "expert": "7", "live": "1"}
    assert not app.exception


def test_the_choice_survives_a_change_of_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = opened(run, monkeypatch)
    app.sidebar.selectbox(key="layer").select(4).run()
    app.switch_page("app_pages/loads.py").run()
    assert app.header[0].value == "Loads of layer 4"


def test_loads_page_shows_the_store_numbers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moeviz.store import open_run, queries

    app = opened(run, monkeypatch, "loads", layer=str(COLLAPSING))
    bars = plots_of(app)[0]["data"][0]
    with open_run(run) as store:
        loads = queries.load_matrix(store)
    here = loads[loads["layer"] == COLLAPSING].sort_values("load_rel", ascending=False, kind="stable")
    assert bars["x"] == [str(expert) for expert in here["expert"]]
    assert len(plots_of(app)) == 4


def test_loads_page_marks_the_alert_of_its_layer_only(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spans(layer: int) -> int:
        app = opened(run, monkeypatch, "loads", layer=str(layer))
        return sum(
            "ROUTING_COLLAPSE" in json.dumps(chart["layout"].get("annotations", []))
            for chart in plots_of(app)
        )

    assert spans(COLLAPSING) == 2
    assert spans(0) == 0


def test_tokens_page_picks_by_domain(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = opened(run, monkeypatch, "tokens")
    app.selectbox(key="domain").select("code").run()
    assert not app.exception
    assert app.selectbox(key="sample").options == [app.selectbox(key="sample").options[0]]
    assert "code" in app.selectbox(key="sample").options[0]
    assert link_of(app)["domain"] == "code"


def test_tokens_page_of_a_frozen_step_offers_no_later_sample(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = opened(run, monkeypatch, "tokens", live="0", step="35")
    assert app.selectbox(key="at").options[0] == "30"


def test_flow_page_draws_the_lift_it_was_asked_for(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = opened(run, monkeypatch, "flow")
    app.select_slider(key="lift").set_value(3.0).run()
    sankey = plots_of(app)[0]["data"][0]
    lifts = [float(text.rpartition(", ")[2].split("×")[0]) for text in sankey["link"]["customdata"]]
    assert lifts
    assert min(lifts) >= 2.95
    assert link_of(app)["lift"] == "3"


def test_flow_page_needs_two_layers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = opened(run, monkeypatch, "flow")
    app.multiselect(key="layers").set_value([2]).run()
    assert not app.exception
    assert "two or more layers" in app.info[0].value


def test_attention_page_opens_the_head_of_the_link(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = opened(run, monkeypatch, "attention", block="2", head="4", map="50")
    assert "Block 2, head 4" in titles(app)
    assert link_of(app)["map"] == "50"


def test_data_expander_shows_the_question_and_a_download(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = opened(run, monkeypatch, "loads", layer="1")
    assert not app.code, "closed expanders ask nothing"
    app.session_state["data_load_bars"] = True
    app.run()
    assert f"queries.load_matrix(run, step={STEPS - 1})" in app.code[0].value
    assert len(app.dataframe[0].value) == E
    assert app.get("download_button")


def test_no_run_at_all_names_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = opened(tmp_path / "nothing", monkeypatch)
    assert [code.value for code in app.code] == ["moeviz demo"]


def test_an_empty_and_a_damaged_run_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = create_run(tmp_path / "fresh", RunInfo(name="fresh", model=model_info()))
    app = opened(fresh, monkeypatch)
    for page in PAGES[1:]:
        assert "moeviz train --log-routing" in [code.value for code in app.code]
        app.switch_page(f"app_pages/{page}.py").run()
        assert not app.exception
    (fresh / "run.json").write_text("{")
    st.cache_resource.clear()
    app = opened(fresh, monkeypatch)
    assert len(app.error) == 1
    assert "run.json is damaged" in app.error[0].value


def test_a_run_of_a_dense_model_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = ModelInfo(family="dense", layers=())
    app = opened(create_run(tmp_path / "dense", RunInfo(name="dense", model=dense)), monkeypatch)
    assert "records no MoE layer" in app.error[0].value


def test_live_page_loads_neither_figures_nor_torch(run: Path) -> None:
    code = (
        "import sys; from streamlit.testing.v1 import AppTest; "
        f"app = AppTest.from_file({str(app_file())!r}, default_timeout=240).run(); assert not app.exception; "
        "print([name for name in ('moeviz.plots', 'torch', 'textual') if name in sys.modules])"
    )
    environment = {**os.environ, "MOEVIZ_RUN": str(run)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "[]"
