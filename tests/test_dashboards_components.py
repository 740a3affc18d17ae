"""What the browser is sent says what the snapshot says: decoded here as the browser decodes it."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import numpy as np
import pytest
from dashboards_run import TEXTS, attention, pieces

from dashboards.components import duration, grouped, pack, pack_unit
from dashboards.components.alerts import alerts_data
from dashboards.components.attention import attention_data, head_grid_data, is_causal, thumbnail
from dashboards.components.header import header_data
from dashboards.components.load_map import load_map_data, noise_log2
from dashboards.components.tokens import tokens_data
from moeviz.colors import load_level
from moeviz.live import Series, Snapshot
from moeviz.records import AlertRecord, LayerInfo, ModelInfo
from moeviz.store.queries import TraceArrays

L, T, K = 3, 5, 2
WIDTHS = (6, 6, 4)
"""The last layer is narrower than the others."""


def unpack(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=np.dtype(dtype).newbyteorder("<"))


def alert(
    layer: int | None, *, severity: str = "warning", cleared: int | None = None, rule: str = "LOAD_SKEW"
) -> AlertRecord:
    return AlertRecord(
        episode=f"{rule}/{layer}/20",
        rule=rule,
        rule_version=1,
        layer=layer,
        experts=(1, 4),
        severity=severity,
        raised_step=20,
        updated_step=60,
        cleared_step=cleared,
        value=0.5,
        peak=0.4,
        threshold=0.6,
        message="uneven",
        remedy="raise alpha",
    )


@pytest.fixture
def snapshot() -> Snapshot:
    layers = tuple(
        LayerInfo(layer=at, name=f"l{at}", block=at, num_experts=width, top_k=K)
        for at, width in enumerate(WIDTHS)
    )
    load_LE = np.array(
        [[1, 1, 1, 1, 1, 1], [3, 2.4, 0.6, 0, 0, 0], [1, 1.5, 0.5, 1, np.nan, np.nan]], np.float32
    )
    entropy_TL = np.linspace(1, 0.55, T)[:, None] * np.array([[1, 1, 0.99]], np.float32) ** np.arange(L)
    entropy_TL[:, 1] = np.linspace(0.9, 0.5, T)
    return Snapshot(
        run_name="<b>run</b>",
        run_path="/somewhere/run",
        info=ModelInfo(family="test", layers=layers),
        state="live",
        revision=4,
        behind_seconds=0.42,
        step=1060,
        planned_steps=2000,
        tokens=512,
        load_rel_LE=load_LE,
        load_rel_ema_LE=load_LE,
        history_steps_T=np.arange(1056, 1061),
        load_entropy_TL=entropy_TL,
        route_entropy_TL=entropy_TL,
        max_load_TL=np.tile(np.nanmax(load_LE, axis=1), (T, 1)),
        n_eff_L=np.array([6.0, 2.7, 3.6], np.float32),
        drop_rate_L=np.array([0, 0.03, 0], np.float32),
        scalars={"loss": Series(steps=np.array([0, 1060]), values=np.array([5.0, 2.25]))},
        alerts=(alert(1, severity="critical"), alert(2, cleared=50)),
        dropped_samples=7,
    )


def test_pack_keeps_values_and_byte_order() -> None:
    numbers = np.array([[1.5, -2], [300, 0.25]])
    assert unpack(pack(numbers, "f4"), "f4").tolist() == numbers.ravel().tolist()
    assert base64.b64decode(pack(np.array([258]), "u2")) == b"\x02\x01"


def test_pack_unit_is_exact_to_half_a_code() -> None:
    values = np.linspace(0, 1, 1001)
    codes = unpack(pack_unit(values), "u1")
    assert np.abs(codes / 254 - values).max() <= 0.5 / 254 + 1e-9
    assert unpack(pack_unit(np.array([np.nan, 2, -1])), "u1").tolist() == [255, 254, 0]


def test_header_says_state_and_progress(snapshot: Snapshot) -> None:
    data = header_data(snapshot)
    assert (data["state"], data["word"], data["behind"]) == ("live", "live", "0.4 s behind")
    assert data["progress"] == pytest.approx(1061 / 2000)
    assert data["facts"][0] == ("step ", "1\u202f060", "")
    json.dumps(data)


@pytest.mark.parametrize(
    ("state", "seconds", "word", "behind"),
    [
        ("stale", 42.0, "stale", "no write for 42 s"),
        ("dead", 300.0, "presumed dead", "no write for 5 min"),
        ("ended", 7500.0, "ended", "2 h 05 min ago"),
        ("waiting", 0.0, "waiting", "for the first step"),
    ],
)
def test_four_states_have_four_words(
    snapshot: Snapshot, state: str, seconds: float, word: str, behind: str
) -> None:
    data = header_data(replace(snapshot, state=state, behind_seconds=seconds))
    assert (data["word"], data["behind"]) == (word, behind)


def test_tiles_name_the_worst_places(snapshot: Snapshot) -> None:
    tiles = {tile["label"]: tile for tile in header_data(snapshot)["tiles"]}
    assert tiles["Loss"]["value"] == "2.250"
    assert tiles["Loss"]["detail"] == "-2.750 over 1\u202f060 steps"
    assert tiles["Lowest load entropy"]["value"] == "0.50"
    assert tiles["Lowest load entropy"]["detail"] == "L1 · 2.7 of 6 experts"
    # Load 3 of 6 experts, top-2: a share of one half, two slots per token, so every token.
    assert tiles["Largest load"]["value"] == "3.0×"
    assert tiles["Largest load"]["detail"] == "L1 E0 · 100% of tokens"
    assert tiles["Dead / starved"]["value"] == "3 / 0"
    assert tiles["Dropped"]["value"] == "3.00%"
    assert tiles["Recorder"]["value"] == "7"


def test_tiles_carry_the_tone_of_the_layers_alert(snapshot: Snapshot) -> None:
    tiles = {tile["label"]: tile["tone"] for tile in header_data(snapshot)["tiles"]}
    assert tiles == {
        "Loss": "",
        "Lowest load entropy": "critical",
        "Largest load": "critical",
        "Dead / starved": "error",
        "Dropped": "warning",
        "Recorder": "warning",
    }


def test_columns_past_a_narrow_layer_count_as_no_expert(snapshot: Snapshot) -> None:
    alone = replace(snapshot, load_rel_ema_LE=np.where(np.isnan(snapshot.load_rel_LE), np.nan, 1.0))
    assert header_data(alone)["tiles"][3]["value"] == "0 / 0"


def test_long_series_are_thinned_for_sparklines_but_keep_their_ends(snapshot: Snapshot) -> None:
    series = Series(steps=np.arange(5000), values=np.arange(5000, dtype=float))
    spark = header_data(replace(snapshot, scalars={"loss": series}))["tiles"][0]["spark"]
    assert len(spark) <= 60
    assert (spark[0], spark[-1]) == (0, 4999)


def test_sparklines_of_bounded_quantities_keep_their_natural_range(snapshot: Snapshot) -> None:
    tiles = {tile["label"]: tile for tile in header_data(snapshot)["tiles"]}
    assert tiles["Lowest load entropy"]["limits"] == (0, 1)
    assert tiles["Largest load"]["limits"] == (0, 6 / K)
    assert tiles["Loss"]["limits"] == [2.25, 5.0]


def test_recorder_cost_is_the_usual_one_where_it_is_recorded(snapshot: Snapshot) -> None:
    cost = Series(steps=np.arange(3), values=np.array([0.2, 9.0, 0.3]))
    tile = header_data(replace(snapshot, scalars={"recorder_ms": cost}))["tiles"][5]
    assert (tile["value"], tile["detail"]) == ("0.30 ms", "7 samples dropped")


def test_open_alerts_are_counted_in_words_and_shapes(snapshot: Snapshot) -> None:
    alerts = (alert(0, severity="critical"), alert(1), alert(2), alert(None, severity="info"))
    alarms = header_data(replace(snapshot, alerts=alerts))["alarms"]
    assert [alarm["text"] for alarm in alarms] == ["● 1 CRITICAL", "▲ 2 WARNING"]


def test_a_waiting_run_has_no_tiles(snapshot: Snapshot) -> None:
    data = header_data(replace(snapshot, step=-1, state="waiting", scalars={}))
    assert data["tiles"] == []


def test_map_levels_are_the_colour_table_of_the_project(snapshot: Snapshot) -> None:
    data = load_map_data(snapshot)
    levels = unpack(data["level"], "u1").reshape(L, 6).astype(int) - 1
    expected = load_level(snapshot.load_rel_LE, noise_log2(snapshot))
    for layer, width in enumerate(WIDTHS):
        assert levels[layer, :width].tolist() == expected[layer, :width].tolist()
    assert levels[1].tolist()[3:] == [-1, -1, -1], "no token: the dead mark"
    assert levels[0, 0] == 127, "an even load has the middle colour"


def test_map_carries_loads_and_history(snapshot: Snapshot) -> None:
    data = load_map_data(snapshot)
    loads = unpack(data["load"], "u2").reshape(L, 6) * data["unit"]
    assert np.abs(loads - np.nan_to_num(snapshot.load_rel_LE)).max() <= data["unit"]
    assert data["unit"] < 1e-4
    history = unpack(data["history"], "u1").reshape(T, L) / 254
    assert np.abs(history - snapshot.load_entropy_TL).max() < 0.003
    assert data["steps"] == [1056, 1057, 1058, 1059, 1060]
    assert data["alarms"][1]["mark"] == "●"
    assert data["alarms"][0] is data["alarms"][2] is None, "a cleared alert is no alarm"
    json.dumps(data)


def test_map_is_told_in_words(snapshot: Snapshot) -> None:
    alt = load_map_data(snapshot)["alt"]
    assert "expert 0 of layer 1, 3.0 times" in alt
    assert "0.50 of its maximum, in layer 1" in alt
    assert "3 experts got no token" in alt


def test_noise_band_narrows_with_more_tokens(snapshot: Snapshot) -> None:
    few, many = noise_log2(replace(snapshot, tokens=100)), noise_log2(replace(snapshot, tokens=10_000))
    assert (many < few).all()
    assert (few <= 1).all()


def test_alert_rows_say_where_since_when_and_what_to_do(snapshot: Snapshot) -> None:
    data = alerts_data(snapshot)
    (row,) = data["open"]
    assert (row["severity"], row["mark"], row["word"]) == ("critical", "●", "CRITICAL")
    assert row["where"] == "Layer 1 · experts 1, 4"
    assert row["when"] == "since step 20 · 1\u202f040 steps"
    assert (row["layer"], row["expert"], row["remedy"]) == (1, 1, "raise alpha")
    (past,) = data["cleared"]
    assert past["when"] == "steps 20 to 50"


def test_one_row_when_most_layers_complain_alike(snapshot: Snapshot) -> None:
    data = alerts_data(replace(snapshot, alerts=(alert(0), alert(1), alert(2, rule="EXPERT_DEAD"))))
    assert [row["where"] for row in data["open"]] == ["Layers 0, 1", "Layer 2 · experts 1, 4"]


def test_tokens_come_back_as_they_were_traced() -> None:
    rng = np.random.default_rng(1)
    texts = ("<script>", " the", "\n", " fox")
    trace = TraceArrays(
        layers_L=np.arange(L),
        experts_LSK=rng.integers(0, 300, (L, 4, K)),
        weights_LSK=rng.random((L, 4, K)).astype(np.float32),
        token_ids_S=np.array([9, 8, 7, 6], np.int32),
        texts=texts,
        loss_S=np.array([0.5, 2.0, 1.0, np.nan], np.float32),
        domain="stories",
    )
    data = tokens_data(trace, "30.0.1")
    assert (unpack(data["experts"], "u2").reshape(L, 4, K) == trace.experts_LSK).all()
    weights = unpack(data["weights"], "u1").reshape(L, 4, K) / 255
    assert np.abs(weights - trace.weights_LSK).max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(unpack(data["loss"], "f4"), trace.loss_S, equal_nan=True)
    assert data["texts"] == list(texts)
    assert 1.9 < data["loss_max"] <= 2.0
    json.dumps(data)


def causal_map(size: int = 12) -> np.ndarray:
    return attention(0, 0, pieces(TEXTS["stories"])[:size], np.random.default_rng(4))


def test_thumbnails_keep_the_largest_weight_of_each_block() -> None:
    weights = causal_map(12)
    small = thumbnail(weights, 4)
    blocks = np.sqrt(weights).reshape(4, 3, 4, 3).max(axis=(1, 3))
    below = np.tril_indices(4)
    assert np.abs(small[below] / 254 - blocks[below]).max() <= 0.5 / 254 + 1e-6
    assert (small[np.triu_indices(4, 1)] == 255).all()


def test_causality_is_seen_in_the_map() -> None:
    assert is_causal(causal_map())
    assert not is_causal(np.full((4, 4), 0.25))
    assert not is_causal(np.tril(np.ones((4, 6))))


def test_head_grid_has_a_blank_for_a_head_that_was_not_recorded() -> None:
    data = head_grid_data({(0, 0): causal_map(), (1, 2): causal_map()}, [0, 1], [0, 2])
    thumbs = unpack(data["thumbs"], "u1").reshape(2, 2, data["size"], data["size"])
    assert (thumbs[0, 1] == 255).all()
    assert (thumbs[1, 1] != 255).any()
    assert data["facts"][1] == ["not recorded"]
    assert data["facts"][0][0].endswith("on the first token")


def test_large_map_is_on_the_same_scale_as_the_small_ones() -> None:
    weights = causal_map()
    data = attention_data(weights, ["x"] * 12, "200.0")
    shown = (unpack(data["map"], "u1").reshape(12, 12) / 254) ** 2
    assert np.abs(shown - weights).max() < 0.005
    assert data["causal"]
    assert len(data["texts"]) == 12


def test_a_pooled_map_has_no_token_labels() -> None:
    data = attention_data(causal_map(), ["x"] * 48, "200.0", q_len=48)
    assert data["texts"] == []
    assert data["block"] == 4


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min"), (7500, "2 h 05 min"), (400_000, "4 d")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_thousands_are_set_apart() -> None:
    assert grouped(1234567) == "1\u202f234\u202f567"
