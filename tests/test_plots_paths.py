"""Links between layers: nothing lost before the threshold, lifts against an independent table, places that fit."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from moeviz import plots
from moeviz.plots.paths import OTHER
from moeviz.plots.style import CHOSEN

LAYERS, EXPERTS, TOKENS = (1, 4, 6), 9, 3000


@pytest.fixture(scope="module")
def paths_TL() -> np.ndarray:
    """Top-1 expert of each token in three layers; layer 4 follows layer 1 half of the time."""
    rng = np.random.default_rng(5)
    skew = 1 / np.arange(1, EXPERTS + 1)
    first, middle, last = (rng.choice(EXPERTS, TOKENS, p=skew / skew.sum()) for _ in LAYERS)
    middle = np.where(rng.random(TOKENS) < 0.5, (first + 1) % EXPERTS, middle)
    return np.stack([first, middle, last], axis=1)


@pytest.fixture(scope="module")
def transitions(paths_TL: np.ndarray) -> pd.DataFrame:
    parts = []
    for at in range(len(LAYERS) - 1):
        count = (
            pd.DataFrame(paths_TL[:, [at, at + 1]], columns=["source", "target"]).value_counts().reset_index()
        )
        parts.append(count.assign(source_layer=LAYERS[at], target_layer=LAYERS[at + 1]))
    frame = pd.concat(parts, ignore_index=True)
    frame["expected"] = 1.0
    frame["lift"] = 1.0
    return frame


def test_without_a_threshold_no_token_is_lost(transitions: pd.DataFrame) -> None:
    found = plots.path_links(transitions, top=4, min_lift=0)
    assert found.shown == pytest.approx(1)
    assert found.left_out == 0
    assert found.links.groupby("source_layer")["count"].sum().to_dict() == {1: TOKENS, 4: TOKENS}


def test_lift_is_count_over_what_independence_gives(transitions: pd.DataFrame, paths_TL: np.ndarray) -> None:
    links = plots.path_links(transitions, top=EXPERTS, min_lift=0).links
    for row in links.rename(columns={"count": "tokens"}).itertuples():
        a, b = LAYERS.index(row.source_layer), LAYERS.index(row.target_layer)
        from_here, to_there = paths_TL[:, a] == row.source, paths_TL[:, b] == row.target
        assert row.tokens == (from_here & to_there).sum()
        assert row.lift == pytest.approx((from_here & to_there).mean() / from_here.mean() / to_there.mean())


def test_only_the_busiest_experts_keep_their_name(transitions: pd.DataFrame, paths_TL: np.ndarray) -> None:
    links = plots.path_links(transitions, top=3, min_lift=0).links
    for at, layer in enumerate(LAYERS):
        named = set(links.loc[links["source_layer"] == layer, "source"])
        named |= set(links.loc[links["target_layer"] == layer, "target"])
        busiest = pd.Series(paths_TL[:, at]).value_counts().nlargest(3).index
        assert named == {*busiest, OTHER}


def test_threshold_and_limit_drop_links_and_say_so(transitions: pd.DataFrame) -> None:
    everything = plots.path_links(transitions, min_lift=0).links
    found = plots.path_links(transitions, min_lift=1.5, max_links=5)
    above = everything[everything["lift"] >= 1.5]
    assert len(found.links) == 5
    assert found.left_out == len(above) - 5
    assert set(found.links["count"]) == set(above["count"].nlargest(5))
    assert found.shown == pytest.approx(found.links["count"].sum() / (2 * TOKENS))


def test_sankey_carries_the_links(transitions: pd.DataFrame) -> None:
    links = plots.path_links(transitions, top=4, min_lift=1.1).links
    (sankey,) = plots.path_sankey(links).data
    assert list(sankey.link.value) == links["count"].tolist()
    names = list(sankey.node.customdata)
    for row, source, target in zip(links.itertuples(), sankey.link.source, sankey.link.target, strict=True):
        expert = "other experts" if row.source == OTHER else f"expert {row.source}"
        assert names[source] == f"layer {row.source_layer}, {expert}"
        assert names[target].startswith(f"layer {row.target_layer}, ")


def test_sankey_nodes_stand_in_order_without_overlap(transitions: pd.DataFrame) -> None:
    links = plots.path_links(transitions, top=4, min_lift=0).links
    height = 540
    (sankey,) = plots.path_sankey(links, height=height).data
    x, y = np.array(sankey.node.x), np.array(sankey.node.y)
    assert ((x > 0) & (x < 1) & (y > 0) & (y < 1)).all()
    carried = np.zeros(len(x))
    for side in (sankey.link.source, sankey.link.target):
        carried = np.maximum(carried, np.bincount(side, weights=sankey.link.value, minlength=len(x)))
    # Each of the three columns carries all tokens, in five nodes: together they fill the figure.
    assert carried.sum() == 3 * TOKENS
    for column in np.unique(x):
        here = np.flatnonzero(x == column)
        centres, sizes = y[here], carried[here] / TOKENS * 0.9
        assert (np.diff(centres) > (sizes[:-1] + sizes[1:]) / 2).all()


def test_sankey_with_a_chosen_expert_colours_only_its_links(transitions: pd.DataFrame) -> None:
    links = plots.path_links(transitions, min_lift=0).links
    (sankey,) = plots.path_sankey(links, layer=4, expert=2).data
    through = ((links["source_layer"] == 4) & (links["source"] == 2)) | (
        (links["target_layer"] == 4) & (links["target"] == 2)
    )
    orange = [color.startswith("rgba(230,159,0") for color in sankey.link.color]
    assert orange == through.tolist()
    assert list(sankey.node.color).count(CHOSEN) == 1


def test_sankey_of_no_links_is_empty(transitions: pd.DataFrame) -> None:
    links = plots.path_links(transitions, min_lift=1e9).links
    assert links.empty
    assert len(plots.path_sankey(links).data[0].link.value) == 0


def test_matrix_is_log2_of_the_lift_and_blank_where_nothing_moved() -> None:
    pairs = pd.DataFrame(
        {
            "source_layer": 1,
            "source": [0, 2],
            "target_layer": 4,
            "target": [3, 1],
            "count": [8, 1],
            "expected": [2.0, 4.0],
            "lift": [4.0, 0.25],
        }
    )
    (heat,) = plots.lift_matrix(pairs, num_sources=3, num_targets=5).data
    z = np.array(heat.z)
    assert z.shape == (3, 5)
    assert (z[0, 3], z[2, 1]) == (2, -2)
    assert np.isnan(z).sum() == 13
    assert heat.customdata[0][3][0] == 8


def test_strongest_routes_come_by_tokens_beyond_chance() -> None:
    pairs = pd.DataFrame(
        {"source": [0, 1, 2], "target": [5, 6, 7], "count": [10, 100, 3], "lift": [5, 1.1, 0.5]}
    )
    pairs["expected"] = pairs["count"] / pairs["lift"]
    routes = plots.strongest_routes(pairs)
    assert routes["source"].tolist() == [1, 0]
    assert routes["excess"].tolist() == pytest.approx([100 - 100 / 1.1, 8])
