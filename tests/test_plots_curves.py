"""Curves are the table's numbers; floors and alert spans stand where they were told to."""

from __future__ import annotations

import pandas as pd
import pytest

from moeviz import plots
from moeviz.plots.style import CHOSEN


@pytest.fixture
def values() -> pd.DataFrame:
    rows = [(step, layer, 1 - 0.01 * step * layer) for layer in range(3) for step in range(0, 50, 10)]
    return pd.DataFrame(rows, columns=["step", "layer", "value"])


def test_one_line_per_layer_the_chosen_one_in_front(values: pd.DataFrame) -> None:
    figure = plots.metric_curves(values, label="fraction", layer=1)
    assert [trace.name for trace in figure.data] == ["layer 0", "layer 2", "layer 1"]
    assert figure.data[-1].line.color == CHOSEN
    for trace in figure.data:
        rows = values[values["layer"] == int(trace.name.split()[1])]
        assert list(trace.x) == rows["step"].tolist()
        assert list(trace.y) == rows["value"].tolist()


def test_a_run_level_series_has_one_line() -> None:
    frame = pd.DataFrame({"step": [1, 2], "layer": [None, None], "value": [3.0, 2.0]})
    (line,) = plots.metric_curves(frame, label="loss").data
    assert (line.name, list(line.y)) == ("run", [3.0, 2.0])


def test_floor_is_dashed_over_all_steps(values: pd.DataFrame) -> None:
    floor = plots.metric_curves(values, label="fraction", floor=0.97).data[-1]
    assert floor.line.dash == "dash"
    assert list(floor.x) == [0, 40]
    assert list(floor.y) == [0.97, 0.97]


def test_floor_may_change_over_steps(values: pd.DataFrame) -> None:
    line = pd.DataFrame({"step": [0, 20, 40], "value": [0.9, 0.95, 0.99]})
    floor = plots.metric_curves(values, label="fraction", floor=line).data[-1]
    assert list(floor.y) == [0.9, 0.95, 0.99]


def test_alert_spans_reach_from_raised_to_cleared_or_to_now(values: pd.DataFrame) -> None:
    alerts = pd.DataFrame(
        {
            "rule": ["LOAD_SKEW", "ROUTING_COLLAPSE"],
            "severity": ["warning", "critical"],
            "raised_step": [10, 30],
            "cleared_step": [25, None],
        }
    )
    figure = plots.alert_spans(plots.metric_curves(values, label="fraction"), alerts, last_step=40)
    assert [(shape.x0, shape.x1) for shape in figure.layout.shapes] == [(10, 25), (30, 40)]
    assert [note.text for note in figure.layout.annotations] == [
        "▲ LOAD_SKEW from step 10",
        "● ROUTING_COLLAPSE from step 30",
    ]


def test_no_alerts_leave_the_figure_alone(values: pd.DataFrame) -> None:
    alerts = pd.DataFrame({"rule": [], "severity": [], "raised_step": [], "cleared_step": []})
    figure = plots.alert_spans(plots.metric_curves(values, label="fraction"), alerts, last_step=40)
    assert not figure.layout.shapes
