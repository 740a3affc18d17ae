"""Every question against a recount in numpy, and the same answers live, merged, packed and unpacked."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from store_runs import DOMAINS, EXPERTS, K, L, N, Step, alert, event, new_run, write_steps

from moeviz.errors import MoevizError
from moeviz.records import LoadRecord
from moeviz.store import queries
from moeviz.store.compact import Rules, compact_run
from moeviz.store.pack import pack_run, unpack_run
from moeviz.store.reader import Store, open_run
from moeviz.store.writer import SegmentWriter

STEPS = 24
AT_ONCE = Rules(fan_in=2, most=4, delay_seconds=0.0, grace_seconds=0.0)

QUESTIONS: dict[str, Callable[[Store], Any]] = {
    "last_step": queries.last_step,
    "step_range": queries.step_range,
    "load_matrix": queries.load_matrix,
    "load_matrix_old": lambda store: queries.load_matrix(store, 3),
    "load_over_time": lambda store: queries.load_over_time(store, 1),
    "load_over_time_coarse": lambda store: queries.load_over_time(store, 1, points=5, first=2, last=20),
    "load_history": lambda store: queries.load_history(store, 4, 9),
    "metric_names": queries.metric_names,
    "metric_over_time": lambda store: queries.metric_over_time(store, "gini", points=7),
    "metric_of_run": lambda store: queries.metric_over_time(store, "maxvio"),
    "metric_mean": lambda store: queries.metric_over_time(store, "entropy_nats", layer=2),
    "scalars": lambda store: queries.scalars(store, points=6),
    "sequences": lambda store: queries.sequences(store, last=10),
    "token_flow": lambda store: queries.token_flow(store, 5, 1),
    "transitions": lambda store: queries.transitions(store, [0, 1, 2]),
    "transitions_domain": lambda store: queries.transitions(
        store, [2, 0], 3, 15, domain="code", weighted=True
    ),
    "coactivation": lambda store: queries.coactivation(store, 1, 2, 20),
    "expert_tokens": lambda store: queries.expert_tokens(store, 1, 3),
    "attention_index": queries.attention_index,
    "attention_map": lambda store: queries.attention_map(store, 7, 1, 2, 0),
    "alerts": queries.alerts,
    "alert_records": queries.alert_records,
    "events": queries.events,
    "has_ended": queries.has_ended,
    "dropped_samples": queries.dropped_samples,
    "step_rhythm": queries.step_rhythm,
    "decisions": lambda store: store.sql("SELECT * FROM decisions ORDER BY ALL"),
}


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    return [Step(step) for step in range(STEPS)]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = new_run(tmp_path_factory.mktemp("queries") / "run")
    writer = SegmentWriter(path, flush_seconds=1e9)
    writer.write(event(0, "started"))
    write_steps(writer, range(STEPS), flush_every=2)
    writer.write(alert("COLLAPSE/1/5", 5))
    writer.write(alert("COLLAPSE/1/5", 9, severity="critical", peak=0.2))
    writer.write(alert("STARVED/2/6", 6, severity="warning"))
    writer.write(alert("STARVED/2/6", 8, cleared=8, severity="warning"))
    writer.write(event(12, "dropped_samples", samples=4, total=4))
    writer.write(event(15, "dropped_samples", samples=3, total=7))
    writer.write(event(STEPS, "ended"))
    writer.close()
    return path


@pytest.fixture(scope="module")
def store(live: Path) -> Iterator[Store]:
    with open_run(live) as opened:
        yield opened


@pytest.fixture(scope="module", params=["merged", "packed", "unpacked", "one file"])
def other_form(
    request: pytest.FixtureRequest, live: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Store]:
    path = tmp_path_factory.mktemp(request.param.replace(" ", "_")) / "run"
    shutil.copytree(live, path)
    if request.param == "merged":
        for late in (0, 1, 2, 3):
            compact_run(path, AT_ONCE, now=time.time() + late)
        assert len(list((path / "routing").iterdir())) < len(list((live / "routing").iterdir())) / 3
    else:
        pack_run(path)
    if request.param == "unpacked":
        unpack_run(path)
    if request.param == "one file":
        path = shutil.move(path / "run.duckdb", path.parent / "renamed.duckdb")
    with open_run(path) as opened:
        yield opened


def assert_same(one: Any, two: Any) -> None:
    if isinstance(one, pd.DataFrame):
        lists = [
            name for name in one.columns if one[name].map(lambda value: isinstance(value, np.ndarray)).any()
        ]
        for name in lists:
            assert [list(value) for value in one[name]] == [list(value) for value in two[name]]
        pd.testing.assert_frame_equal(one.drop(columns=lists), two.drop(columns=lists))
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, two)
    else:
        assert one == two


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_form_of_a_run_gives_the_same_answers(store: Store, other_form: Store, question: str) -> None:
    assert_same(QUESTIONS[question](store), QUESTIONS[question](other_form))
    assert other_form.notes == []


def test_load_matrix_is_the_counts_of_the_newest_step(store: Store, steps: list[Step]) -> None:
    found = queries.load_matrix(store)
    assert list(found.columns) == ["layer", "expert", "count", "share", "load_rel", "prob_mean", "bias"]
    counts_LE, tokens = steps[-1].counts_LE, steps[-1].tokens
    for layer, one in found.groupby("layer"):
        size = EXPERTS[int(layer)]
        counts = counts_LE[layer, :size]
        assert one["expert"].tolist() == list(range(size))
        assert one["count"].tolist() == counts.tolist()
        np.testing.assert_allclose(one["share"], counts / counts.sum(), rtol=1e-6)
        np.testing.assert_allclose(one["load_rel"], counts / counts.sum() * size, rtol=1e-6)
        np.testing.assert_allclose(one["prob_mean"], counts / K / tokens, rtol=1e-6)
        np.testing.assert_allclose(one["bias"], steps[-1].bias_LE[layer, :size], rtol=1e-6)


def test_a_step_that_was_not_recorded_has_no_loads(store: Store) -> None:
    assert queries.load_matrix(store, 999).empty


def test_load_over_time_sums_counts_before_it_divides(store: Store, steps: list[Step]) -> None:
    found = queries.load_over_time(store, 2, points=5)
    width = -(-STEPS // 5)
    for start, one in found.groupby("step"):
        counts = sum(step.counts_LE[2, : EXPERTS[2]] for step in steps[int(start) : int(start) + width])
        np.testing.assert_allclose(one["share"], counts / counts.sum(), rtol=1e-6)
        np.testing.assert_allclose(one["load_rel"], counts / counts.sum() * EXPERTS[2], rtol=1e-6)
    assert found["step"].nunique() == 5


def test_load_history_keeps_every_step(store: Store, steps: list[Step]) -> None:
    found = queries.load_history(store, 3, 5)
    assert found[["step", "layer"]].to_numpy().tolist() == [
        [step, layer] for step in (3, 4, 5) for layer in range(L)
    ]
    for row in found.itertuples():
        assert row.counts.tolist() == steps[row.step].counts_LE[row.layer, : EXPERTS[row.layer]].tolist()
        assert row.entropy_nats == pytest.approx(
            steps[row.step].entropy_L[row.layer] / steps[row.step].tokens
        )
        assert (row.tokens, row.dropped) == (steps[row.step].tokens, 0)


def test_ranks_that_count_for_themselves_are_summed(tmp_path: Path) -> None:
    path = new_run(tmp_path / "run", ranks=2)
    by_rank = [write_steps(SegmentWriter(path, rank=rank), range(3), rank=rank) for rank in (0, 1)]
    total = [one.counts_LE + two.counts_LE for one, two in zip(*by_rank, strict=True)]
    with open_run(path) as two_ranks:
        matrix, history = queries.load_matrix(two_ranks, 1), queries.load_history(two_ranks, 0, 2)
        over_time = queries.load_over_time(two_ranks, 0, points=100)
    assert matrix["count"].tolist() == [
        n for layer, size in enumerate(EXPERTS) for n in total[1][layer, :size]
    ]
    for row in history.itertuples():
        assert row.counts.tolist() == total[row.step][row.layer, : EXPERTS[row.layer]].tolist()
        assert row.tokens == by_rank[0][row.step].tokens + by_rank[1][row.step].tokens
    shares = over_time[over_time["step"] == 2]["share"]
    np.testing.assert_allclose(shares, total[2][0, : EXPERTS[0]] / total[2][0].sum(), rtol=1e-6)


def test_metrics_and_means_over_time(store: Store, steps: list[Step]) -> None:
    assert queries.metric_names(store) == ["entropy_nats", "gini", "maxvio", "mean/other"]
    gini = queries.metric_over_time(store, "gini")
    expected = [
        [step, layer, steps[step].entropy_L[layer] / 7] for layer in range(L) for step in range(STEPS)
    ]
    np.testing.assert_allclose(gini.to_numpy(dtype=float), expected, rtol=1e-6)
    run_level = queries.metric_over_time(store, "maxvio", points=6)
    assert run_level["layer"].isna().all()
    np.testing.assert_allclose(
        run_level["value"], [0.25 * np.mean(range(at, at + 4)) for at in range(0, STEPS, 4)]
    )
    mean = queries.metric_over_time(store, "entropy_nats", layer=1)
    np.testing.assert_allclose(mean["value"], [step.entropy_L[1] / step.tokens for step in steps], rtol=1e-6)
    assert queries.metric_over_time(store, "nothing").empty


def test_scalars_are_bucket_means(store: Store, steps: list[Step]) -> None:
    found = queries.scalars(store, ["loss"], points=6)
    assert found["step"].tolist() == list(range(0, STEPS, 4))
    expected = [np.mean([step.loss for step in steps[at : at + 4]]) for at in range(0, STEPS, 4)]
    np.testing.assert_allclose(found["value"], expected)
    assert set(queries.scalars(store)["name"]) == {"loss", "lr"}


def test_sequences_are_the_newest_first(store: Store, steps: list[Step]) -> None:
    found = queries.sequences(store, last=5)
    assert found[["step", "seq"]].to_numpy().tolist() == [[23, 0], [23, 1], [23, 2], [22, 0], [22, 1]]
    assert [None if pd.isna(domain) else domain for domain in found["domain"][:3]] == list(DOMAINS)
    for row in found.itertuples():
        n = steps[row.step].lengths_N[row.seq]
        assert row.n_tokens == n
        np.testing.assert_allclose(row.mean_loss, np.nanmean(steps[row.step].loss_NS[row.seq, :n]), rtol=1e-5)


@pytest.mark.parametrize(("at", "seq"), [(0, 0), (5, 1), (23, 2)])
def test_a_trace_is_the_sequence_through_all_layers(
    store: Store, steps: list[Step], at: int, seq: int
) -> None:
    step, trace = steps[at], queries.trace_arrays(store, at, seq)
    n = step.lengths_N[seq]
    assert trace.layers_L.tolist() == list(range(L))
    np.testing.assert_array_equal(trace.experts_LSK, step.experts_LNSK[:, seq, :n])
    np.testing.assert_allclose(trace.weights_LSK, step.weights_LNSK[:, seq, :n], atol=1 / 500)
    np.testing.assert_array_equal(trace.token_ids_S, step.token_ids_NS[seq, :n])
    np.testing.assert_array_equal(trace.loss_S, step.loss_NS[seq, :n])
    assert trace.texts == tuple(f"t{token_id}" for token_id in trace.token_ids_S)
    assert trace.domain == DOMAINS[seq]
    flow = queries.token_flow(store, at, seq)
    assert list(flow.columns) == [
        "pos",
        "token_id",
        "text",
        "layer",
        "slot",
        "expert",
        "weight",
        "token_loss",
    ]
    assert flow["expert"].tolist() == trace.experts_LSK.ravel().tolist()
    assert len(flow) == L * n * K


def test_a_trace_of_nothing_is_empty(store: Store) -> None:
    trace = queries.trace_arrays(store, 999, 0)
    assert (trace.experts_LSK.shape, trace.texts, trace.domain) == ((0, 0, 0), (), None)
    assert queries.token_flow(store, 999, 0).empty


def tokens_of(steps: list[Step], layer: int, seqs: range | list[int] = range(N)) -> np.ndarray:
    """Experts of every token of `layer`, [T, K], in order of step and sequence."""
    return np.concatenate([s.experts_LNSK[layer, n, : s.lengths_N[n]] for s in steps for n in seqs])


@pytest.mark.parametrize("domain", [None, "code"])
def test_transitions_count_pairs_of_first_choices(
    store: Store, steps: list[Step], domain: str | None
) -> None:
    seqs = range(N) if domain is None else [DOMAINS.index(domain)]
    found = queries.transitions(store, [0, 2, 1], first=4, last=17, domain=domain)
    for source_layer, target_layer in pairwise([0, 2, 1]):
        source = tokens_of(steps[4:18], source_layer, seqs)[:, 0]
        target = tokens_of(steps[4:18], target_layer, seqs)[:, 0]
        rows = found[(found["source_layer"] == source_layer) & (found["target_layer"] == target_layer)]
        assert rows["count"].sum() == len(source)
        for row in rows.to_dict("records"):
            from_source, to_target = source == row["source"], target == row["target"]
            expected = from_source.mean() * to_target.mean() * len(source)
            assert row["count"] == (from_source & to_target).sum() > 0
            assert row["expected"] == pytest.approx(expected)
            assert row["lift"] == pytest.approx(row["count"] / expected)


def test_weighted_transitions_add_products_of_gate_weights(store: Store, steps: list[Step]) -> None:
    found = queries.transitions(store, [0, 1], weighted=True)
    weights = [
        np.concatenate([s.weights_LNSK[layer, n, : s.lengths_N[n], 0] for s in steps for n in range(N)])
        for layer in (0, 1)
    ]
    assert found["count"].sum() == pytest.approx((weights[0] * weights[1]).sum(), rel=2e-3)


def test_transitions_want_two_layers_that_exist(store: Store) -> None:
    with pytest.raises(MoevizError, match="no successive pair"):
        queries.transitions(store, [1])
    with pytest.raises(MoevizError, match=r"layer=7 is not one of the model's MoE layers, 0 to 2"):
        queries.transitions(store, [0, 7])


def test_coactivation_is_x_transposed_x(store: Store, steps: list[Step]) -> None:
    chosen_TK = tokens_of(steps[2:21], 1)
    X = np.zeros((len(chosen_TK), EXPERTS[1]), dtype=int)
    X[np.arange(len(X))[:, None], chosen_TK] = 1
    found = queries.coactivation(store, 1, first=2, last=20)
    np.testing.assert_array_equal(found, X.T @ X)
    assert found.sum() == len(X) * K * K


def test_expert_tokens_rank_by_lift_over_the_coverage(store: Store, steps: list[Step]) -> None:
    chosen = (tokens_of(steps, 2) == 1).any(1)
    ids = np.concatenate([s.token_ids_NS[n, : s.lengths_N[n]] for s in steps for n in range(N)])
    found = queries.expert_tokens(store, 2, 1, limit=4)
    assert list(found.columns) == ["token_id", "text", "count", "total", "lift"]
    assert found["lift"].is_monotonic_decreasing
    for row in found.to_dict("records"):
        of_id = ids == row["token_id"]
        assert (row["count"], row["total"]) == ((chosen & of_id).sum(), of_id.sum())
        assert row["lift"] == pytest.approx(chosen[of_id].mean() / chosen.mean())
        assert row["text"] == f"t{row['token_id']}"
    best = max(range(11), key=lambda token_id: chosen[ids == token_id].mean())
    assert found["token_id"].iloc[0] == best
    assert queries.expert_tokens(store, 2, 1, min_count=10_000).empty


def test_attention_comes_back_to_half_a_code(store: Store, steps: list[Step]) -> None:
    index = queries.attention_index(store)
    assert list(index.columns) == ["step", "layer", "head", "seq", "rows", "cols"]
    assert index["step"].tolist() == list(range(STEPS))
    found = queries.attention_map(store, 7, 1, 2, 0)
    assert found is not None
    np.testing.assert_allclose(found, steps[7].map_QC, atol=1 / 509)
    assert queries.attention_map(store, 7, 1, 3, 0) is None


def test_alerts_are_the_newest_state_of_each_episode(store: Store) -> None:
    found = queries.alert_records(store)
    assert found == (
        alert("COLLAPSE/1/5", 9, severity="critical", peak=0.2),
        alert("STARVED/2/6", 8, cleared=8, severity="warning"),
    )
    assert queries.alerts(store, open_only=True)["episode"].tolist() == ["COLLAPSE/1/5"]


def test_events_are_in_order_and_say_whether_the_run_ended(store: Store) -> None:
    assert queries.events(store)["kind"].tolist() == [
        "started",
        "dropped_samples",
        "dropped_samples",
        "ended",
    ]
    assert queries.has_ended(store)
    assert queries.dropped_samples(store) == 7


@pytest.mark.parametrize(
    ("last_ts", "interval", "ended", "now", "state"),
    [
        (None, 0.0, False, 5.0, "waiting"),
        (100.0, 0.1, False, 110.0, "live"),
        (100.0, 0.1, False, 131.0, "stale"),
        (100.0, 0.1, False, 221.0, "dead"),
        (100.0, 0.1, True, 9999.0, "ended"),
        (100.0, 60.0, False, 600.0, "live"),
        (100.0, 60.0, False, 900.0, "stale"),
        (100.0, 60.0, False, 1400.0, "dead"),
    ],
)
def test_a_run_is_late_against_its_own_rhythm(
    last_ts: float | None, interval: float, ended: bool, now: float, state: str
) -> None:
    assert queries.run_state(last_ts, interval, ended, now) == state


def test_list_runs_tells_how_each_fares(live: Path, tmp_path: Path) -> None:
    shutil.copytree(live, tmp_path / "ended")
    new_run(tmp_path / "young", created=5e9)
    (tmp_path / "no run").mkdir()
    found = queries.list_runs(tmp_path).set_index("state")
    assert list(found.index) == ["waiting", "ended"]
    ended, steps = found.loc["ended"], Step(STEPS - 1)
    assert (ended["last_step"], ended["planned_steps"], ended["open_alerts"]) == (STEPS - 1, 100, 1)
    assert ended["loss"] == pytest.approx(steps.loss)
    share = [
        steps.counts_LE[layer, :size] / steps.counts_LE[layer].sum() for layer, size in enumerate(EXPERTS)
    ]
    entropy = [-(s[s > 0] * np.log(s[s > 0])).sum() / np.log(len(s)) for s in share]
    assert ended["worst_entropy"] == pytest.approx(min(entropy))
    assert pd.isna(found.loc["waiting"]["loss"])
    assert queries.list_runs(tmp_path / "nowhere").empty


def test_long_curves_from_the_level_of_detail_equal_those_from_every_step(tmp_path: Path) -> None:
    path = new_run(tmp_path / "run")
    rng = np.random.default_rng(0)
    writer = SegmentWriter(path, flush_seconds=1e9)
    for step in range(1250):
        tokens = int(rng.integers(10, 2000))
        counts = np.stack([np.pad(rng.multinomial(tokens * K, np.ones(e) / e), (0, 7 - e)) for e in EXPERTS])
        writer.write(LoadRecord(step=step, rank=0, ts=float(step), tokens=tokens, counts_LE=counts))
        if step % 97 == 0:
            writer.flush()
    writer.close()
    with open_run(path) as opened:
        plain = queries.load_over_time(opened, 1, points=6)
        inside = queries.load_over_time(opened, 1, points=3, first=150, last=1100)
        compact_run(path, AT_ONCE)
        assert opened.sql("SELECT DISTINCT step FROM load_lod ORDER BY step")["step"].tolist() == list(
            range(0, 1200, 100)
        )
        pd.testing.assert_frame_equal(queries.load_over_time(opened, 1, points=6), plain)
        pd.testing.assert_frame_equal(
            queries.load_over_time(opened, 1, points=3, first=150, last=1100), inside
        )
        assert "load_lod" in opened.source("load_lod")
        lod = opened.sql("SELECT * FROM load_lod WHERE layer = 1 AND step = 300")
        raw = opened.sql("SELECT counts FROM expert_load WHERE layer = 1 AND step BETWEEN 300 AND 399")
    counts = np.stack(raw["counts"].to_list())
    rel = counts / counts.sum(1, keepdims=True) * EXPERTS[1]
    assert lod["counts"].iloc[0].tolist() == counts.sum(0).tolist()
    np.testing.assert_allclose(lod["lo"].iloc[0], rel.min(0), rtol=1e-6)
    np.testing.assert_allclose(lod["hi"].iloc[0], rel.max(0), rtol=1e-6)
