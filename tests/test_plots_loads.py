"""Load figures show the numbers of their table, and the river loses no share."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from moeviz import plots
from moeviz.plots.style import CHOSEN

STEPS, EXPERTS = 7, 11


@pytest.fixture
def over_time() -> pd.DataFrame:
    """`load_over_time` of a layer: expert 4 grows, expert 6 never gets a token."""
    rng = np.random.default_rng(3)
    weight_TE = rng.uniform(0.8, 1.2, (STEPS, EXPERTS))
    weight_TE[:, 4] *= np.arange(1, STEPS + 1)
    weight_TE[:, 6] = 0
    share_TE = weight_TE / weight_TE.sum(axis=1, keepdims=True)
    step, expert = np.indices(share_TE.shape)
    share = share_TE.ravel()
    return pd.DataFrame(
        {"step": 10 * step.ravel(), "expert": expert.ravel(), "share": share, "load_rel": EXPERTS * share}
    )


def test_river_shares_sum_to_one_and_other_comes_last(over_time: pd.DataFrame) -> None:
    groups = plots.river_groups(over_time, top=3)
    assert groups.groupby("step")["share"].sum().to_numpy() == pytest.approx(np.ones(STEPS))
    names = list(dict.fromkeys(groups["group"]))
    assert names[-1] == "other"
    assert len(names) == 4
    assert names[:-1] == sorted(names[:-1], key=int)


def test_river_keeps_the_experts_that_changed_most(over_time: pd.DataFrame) -> None:
    change = over_time.groupby("expert")["share"].agg(lambda share: share.max() - share.min())
    groups = set(plots.river_groups(over_time, top=3)["group"]) - {"other"}
    assert groups == {str(expert) for expert in change.nlargest(3).index}
    assert "4" in groups


def test_river_keeps_a_chosen_expert_that_never_changed(over_time: pd.DataFrame) -> None:
    groups = plots.river_groups(over_time, top=3, keep=6)
    assert "6" in set(groups["group"])
    assert groups["group"].nunique() == 4


def test_river_of_few_experts_has_no_other(over_time: pd.DataFrame) -> None:
    few = over_time[over_time["expert"] < 3]
    assert set(plots.river_groups(few, top=7)["group"]) == {"0", "1", "2"}


def test_river_traces_equal_the_groups(over_time: pd.DataFrame) -> None:
    groups = plots.river_groups(over_time, top=3)
    figure = plots.load_river(groups, expert=4)
    for trace in figure.data:
        rows = groups[groups["group"] == trace.name.removeprefix("E")]
        assert list(trace.x) == rows["step"].tolist()
        assert list(trace.y) == rows["share"].tolist()
    fills = {trace.name: trace.fillcolor for trace in figure.data}
    assert fills["E4"].startswith("rgba(230,159,0")
    assert len(set(fills.values())) == len(fills)


def test_bars_are_sorted_loads_with_a_mark_for_the_dead(over_time: pd.DataFrame) -> None:
    last = over_time[over_time["step"] == over_time["step"].max()]
    figure = plots.load_bars(last, noise=0.1, expert=4)
    bars, marks = figure.data
    by_load = last.sort_values("load_rel", ascending=False)
    assert list(bars.x) == [str(expert) for expert in by_load["expert"]]
    assert list(bars.y) == by_load["load_rel"].tolist()
    assert list(marks.x) == ["6"]
    assert bars.marker.color[0] == CHOSEN
    assert sum(color == CHOSEN for color in bars.marker.color) == 1


def test_bars_show_the_noise_band_around_the_even_share(over_time: pd.DataFrame) -> None:
    figure = plots.load_bars(over_time[over_time["step"] == 0], noise=0.25)
    spans = {(shape.y0, shape.y1) for shape in figure.layout.shapes}
    assert spans == {(0.75, 1.25), (1, 1)}


def test_time_map_is_log2_of_the_load_clipped_to_the_scale(over_time: pd.DataFrame) -> None:
    figure = plots.load_time_map(over_time)
    heat, dead = figure.data
    for step, expert, load in over_time[["step", "expert", "load_rel"]].itertuples(index=False):
        shown = heat.z[int(expert)][list(heat.x).index(step)]
        if load == 0:
            assert np.isnan(shown)
        else:
            assert shown == pytest.approx(min(3, max(-3, np.log2(load))))
    assert set(dead.y) == {6}
    assert set(dead.x) <= set(over_time["step"])
    assert len(dead.x) == STEPS


def test_time_map_thins_dead_marks_of_long_runs() -> None:
    steps = np.arange(5000)
    frame = pd.DataFrame({"step": steps, "expert": 0, "load_rel": 0.0})
    _, dead = plots.load_time_map(frame).data
    assert 40 <= len(dead.x) <= 60
