"""One look: ink and paper agree with the dashboard's theme, and every figure stands on any page."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from moeviz import plots
from moeviz.colors import LOAD_STOPS, Theme
from moeviz.plots.style import INK, fade, log2_load


def theme_config() -> dict[str, dict[str, str]]:
    spec = importlib.util.find_spec("dashboards")
    assert spec is not None
    assert spec.origin is not None
    return tomllib.loads((Path(spec.origin).parent / ".streamlit" / "config.toml").read_text())["theme"]


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_ink_is_the_dashboard_theme(theme: Theme) -> None:
    page, ink = theme_config()[theme], INK[theme]
    assert (ink.text, ink.card, ink.accent) == (
        page["textColor"],
        page["secondaryBackgroundColor"],
        page["primaryColor"],
    )
    assert ink.grid == page["borderColor"]


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_an_even_load_fades_into_the_card(theme: Theme) -> None:
    assert LOAD_STOPS[theme][2] == INK[theme].card


def test_log2_load_clips_and_marks_zero() -> None:
    shown = log2_load(np.array([0, 1 / 64, 0.5, 1, 2, 100]))
    assert np.isnan(shown[0])
    assert shown[1:].tolist() == [-3, -1, 0, 1, 3]


def test_fade_keeps_the_colour() -> None:
    assert fade("#E69F00", 0.5) == "rgba(230,159,0,0.5)"


def figures(theme: Theme) -> list[go.Figure]:
    loads = pd.DataFrame({"step": [0, 1], "expert": [0, 0], "share": [1.0, 1.0], "load_rel": [1.0, 1.0]})
    curve = pd.DataFrame({"step": [0, 1], "layer": [0, 0], "value": [1.0, 0.9]})
    moves = pd.DataFrame(
        {"source_layer": [0], "source": [0], "target_layer": [1], "target": [0], "count": [3], "lift": [2.0]}
    )
    return [
        plots.load_bars(loads, noise=0.1, theme=theme),
        plots.load_river(plots.river_groups(loads), theme=theme),
        plots.load_time_map(loads, theme=theme),
        plots.metric_curves(curve, label="x", theme=theme),
        plots.path_sankey(moves, theme=theme),
        plots.lift_matrix(moves, num_sources=1, num_targets=1, theme=theme),
        plots.attention_map(np.eye(3), theme=theme),
    ]


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_every_figure_has_clear_paper_and_the_ink_of_its_theme(theme: Theme) -> None:
    for figure in figures(theme):
        assert figure.layout.paper_bgcolor == "rgba(0,0,0,0)"
        assert figure.layout.font.color == INK[theme].text
        assert figure.to_json()
