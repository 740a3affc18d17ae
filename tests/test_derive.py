"""DeriveSink: it loses and changes nothing, derives what the functions define, survives its own failures."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
from metrics_routing import ListSink, load_record, model

from moeviz.derive import DeriveSink
from moeviz.metrics import by_id, live_ids, load, losses
from moeviz.records import (
    AlertRecord,
    EventRecord,
    LayerInfo,
    LoadRecord,
    MetricRecord,
    ModelInfo,
    ScalarRecord,
)

L, E, K, N = 3, 8, 2, 512


def counts(rng: np.random.Generator, share_E: np.ndarray | None = None) -> np.ndarray:
    return rng.multinomial(N * K, np.full(E, 1 / E) if share_E is None else share_E, size=L)


def full_record(rng: np.random.Generator, step: int, **fields: Any) -> LoadRecord:
    counts_LE = counts(rng)
    values: dict[str, Any] = {
        "prob_sum_LE": rng.dirichlet(np.ones(E), size=L).astype(np.float32) * N,
        "weight_sum_LE": rng.random((L, E)).astype(np.float32) * N,
        "bias_LE": rng.normal(size=(L, E)).astype(np.float32) * 0.01,
        "dropped_LE": counts_LE // 20,
        "token_sums": {
            "entropy_nats": np.full(L, 1.5 * N, dtype=np.float32),
            "lse_squared": np.full(L, 4.0 * N, dtype=np.float32),
            "confidence": np.full(L, 0.3 * N, dtype=np.float32),
            "margin": np.full(L, 0.1 * N, dtype=np.float32),
        },
    }
    return load_record(step, counts_LE, K, **(values | fields))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_every_record_passes_unchanged_and_before_what_follows_from_it(rng: np.random.Generator) -> None:
    inner = ListSink()
    sink = DeriveSink(inner, model(L, E, K))
    records = [
        full_record(rng, 0),
        ScalarRecord(step=0, rank=0, ts=0.0, values={"loss": 2.0}),
        EventRecord(step=0, rank=0, ts=0.0, kind="checkpoint"),
    ]
    for record in records:
        sink.write(record)
    assert [record for record in inner.records if not isinstance(record, MetricRecord)] == records
    assert isinstance(inner.records[1], MetricRecord)
    sink.close()
    assert inner.closed


def test_a_full_record_yields_exactly_the_live_metrics_of_the_table(rng: np.random.Generator) -> None:
    inner = ListSink()
    DeriveSink(inner, model(L, E, K)).write(full_record(rng, 7))
    (metrics,) = inner.of(MetricRecord)
    assert metrics.step == 7
    assert set(metrics.values) == set(live_ids())
    for name, value_L in metrics.values.items():
        assert value_L.shape == (L,), name
        assert value_L.dtype == np.float32
        assert np.isfinite(value_L).all(), name
        assert by_id(name).live


def test_live_values_are_what_the_functions_define(rng: np.random.Generator) -> None:
    inner = ListSink()
    record = full_record(rng, 0)
    DeriveSink(inner, model(L, E, K)).write(record)
    values = inner.of(MetricRecord)[0].values
    share_LE = load.load_share(record.counts_LE)
    expected = {
        "load_entropy": load.load_entropy(share_LE),
        "n_eff": load.n_eff(share_LE),
        "eff_util": load.eff_util(share_LE, K),
        "excess_cov": load.excess_cov(share_LE, K),
        "load_cv": load.load_cv(share_LE),
        "maxvio_batch": load.maxvio(share_LE),
        "maxvio_global": load.maxvio(share_LE),
        "min_load": load.min_load(share_LE),
        "gini": load.gini(share_LE),
        "drop_rate": record.dropped_LE.sum(axis=1) / (N * K),
        "route_entropy": np.full(L, 1.5 / np.log(E)),
        "z_loss": np.full(L, 4.0),
        "lse_rms": np.full(L, 2.0),
        "route_conf": np.full(L, 0.3),
        "margin": np.full(L, 0.1),
        "aux_switch": losses.aux_switch(share_LE, record.prob_sum_LE / N),
        "importance_cv2": load.importance_cv2(record.weight_sum_LE),
        "bias_range": np.ptp(record.bias_LE, axis=1),
        "bias_rms": record.bias_LE.std(axis=1),
        "route_mi": np.maximum(load.entropy_nats(record.prob_sum_LE / N) - 1.5, 0),
    }
    for name, value_L in expected.items():
        np.testing.assert_allclose(values[name], value_L, rtol=1e-5, atol=1e-6, err_msg=name)


def test_what_was_not_recorded_is_absent_not_nan(rng: np.random.Generator) -> None:
    inner = ListSink()
    DeriveSink(inner, model(L, E, K)).write(load_record(0, counts(rng), K))
    names = set(inner.of(MetricRecord)[0].values)
    assert names.isdisjoint({"drop_rate", "z_loss", "route_entropy", "bias_range", "aux_switch", "margin"})
    assert {"load_entropy", "n_eff", "design_effect", "n_dead"} <= names


def test_accumulated_violation_covers_its_window_and_forgets_what_is_older(rng: np.random.Generator) -> None:
    inner = ListSink()
    sink = DeriveSink(inner, model(L, E, K), global_window=20)
    history = [counts(rng, rng.dirichlet(np.ones(E))) for _ in range(50)]
    for step, counts_LE in enumerate(history):
        sink.write(load_record(step, counts_LE, K))
    got_L = inner.of(MetricRecord)[-1].values["maxvio_global"]
    windows = [load.maxvio(load.load_share(np.sum(history[-n:], axis=0))) for n in range(18, 21)]
    assert any(np.allclose(got_L, window_L, rtol=1e-5) for window_L in windows)


def test_layers_of_different_width_keep_their_padding_out(rng: np.random.Generator) -> None:
    layers = (
        LayerInfo(layer=0, name="a", block=0, num_experts=4, top_k=2),
        LayerInfo(layer=1, name="b", block=1, num_experts=6, top_k=2),
    )
    counts_LE = np.array([[10, 20, 30, 40, 0, 0], [5, 15, 25, 5, 25, 25]])
    both, alone = ListSink(), ListSink()
    DeriveSink(both, ModelInfo(family="t", layers=layers)).write(load_record(0, counts_LE, 2))
    DeriveSink(alone, model(1, 4, 2)).write(load_record(0, counts_LE[:1, :4], 2))
    for name, value_L in alone.of(MetricRecord)[0].values.items():
        np.testing.assert_allclose(both.of(MetricRecord)[0].values[name][0], value_L[0], err_msg=name)


def test_a_failure_in_the_derivation_costs_only_what_was_derived(
    rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    inner = ListSink()
    sink = DeriveSink(inner, model(L, E, K))
    wrong = [load_record(step, np.ones((L + 1, E), dtype=np.int64), K) for step in range(3)]
    with caplog.at_level(logging.ERROR):
        for record in wrong:
            sink.write(record)
    assert inner.records == wrong
    assert sink.failures == 3
    assert len(caplog.records) == 1
    sink.write(full_record(rng, 3))
    assert len(inner.of(MetricRecord)) == 1


def test_errors_of_the_inner_sink_are_its_own() -> None:
    class Full(ListSink):
        def write(self, record: object) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        DeriveSink(Full(), model(L, E, K)).write(EventRecord(step=0, rank=0, ts=0.0, kind="started"))


def test_a_failing_listener_costs_no_record(caplog: pytest.LogCaptureFixture) -> None:
    def listener(alert: AlertRecord) -> None:
        raise RuntimeError("no terminal")

    quiet, loud = ListSink(), ListSink()
    sinks = [DeriveSink(quiet, model(L, E, K)), DeriveSink(loud, model(L, E, K), on_alert=listener)]
    with caplog.at_level(logging.ERROR):
        for step in range(430):
            for sink in sinks:
                sink.write(load_record(step, collapse(step), K))
    assert loud.alerts == quiet.alerts != []
    assert "no terminal" in caplog.text


def test_a_step_without_tokens_yields_nothing() -> None:
    inner = ListSink()
    sink = DeriveSink(inner, model(L, E, K))
    sink.write(load_record(0, np.zeros((L, E), dtype=np.int64), K))
    assert len(inner.records) == 1
    assert sink.failures == 0


def collapse(step: int) -> np.ndarray:
    rng = np.random.default_rng(step)
    return counts(rng, np.r_[0.5, 0.5, np.zeros(E - 2)] if step >= 400 else None)


def test_alerts_are_announced_once_and_written_always() -> None:
    inner, heard = ListSink(), []
    sink = DeriveSink(inner, model(L, E, K), on_alert=heard.append)
    for step in range(520):
        sink.write(load_record(step, collapse(step), K))
    updates = [alert for alert in inner.alerts if alert.updated_step > alert.raised_step]
    assert updates
    assert heard == [alert for alert in inner.alerts if alert not in updates]
    assert {alert.rule for alert in sink.open_alerts} >= {"ROUTING_COLLAPSE", "LOAD_SKEW"}


def test_steps_may_have_gaps() -> None:
    inner = ListSink()
    sink = DeriveSink(inner, model(L, E, K))
    for step in range(440):
        sink.write(load_record(7 * step, collapse(step), K))
    found = [alert for alert in inner.alerts if alert.rule == "ROUTING_COLLAPSE"]
    assert {alert.layer for alert in found} == {0, 1, 2}
    assert len({alert.episode for alert in found}) == L
    assert all(7 * 400 < alert.raised_step < 7 * 430 for alert in found)


def test_a_resumed_run_goes_on_with_its_open_alerts() -> None:
    """Replaying the past into a new sink gives the alerts that an uninterrupted run would have given."""
    records = [load_record(step, collapse(step), K) for step in range(520)]
    records += [load_record(step, counts(np.random.default_rng(step)), K) for step in range(520, 700)]
    whole = ListSink()
    uninterrupted = DeriveSink(whole, model(L, E, K))
    for record in records:
        uninterrupted.write(record)
    first, second = ListSink(), ListSink()
    before = DeriveSink(first, model(L, E, K))
    for record in records[:500]:
        before.write(record)
    after = DeriveSink(second, model(L, E, K))
    after.replay(records[450:500], before.open_alerts)
    assert second.records == []
    for record in records[500:]:
        after.write(record)

    def closed(sink: ListSink) -> dict[str, int]:
        return {alert.episode: alert.raised_step for alert in sink.alerts if alert.cleared_step is not None}

    expected = {
        episode: step for episode, step in closed(whole).items() if not episode.startswith("LOAD_DRIFT")
    }
    assert len(expected) >= 3 * L
    assert expected.items() <= closed(second).items()
    for alert in second.alerts:
        if alert.rule == "EXPERT_STARVED":
            assert "step -1" not in alert.message
            assert alert.peak <= min(a.peak for a in first.alerts if a.episode == alert.episode)
    reopened = [a for a in second.alerts if a.raised_step == a.updated_step and a.severity != "info"]
    assert reopened == []


def test_a_late_evaluation_is_no_way_back() -> None:
    inner = ListSink()
    sink = DeriveSink(inner, model(L, E, K))
    for step in range(300):
        loss = 2.0 + 0.02 * math.sin(step) + (step == 299)
        sink.write(ScalarRecord(step=step, rank=0, ts=0.0, values={"loss": loss}))
    assert [alert.rule for alert in sink.open_alerts] == ["LOSS_SPIKE"]
    sink.write(ScalarRecord(step=250, rank=0, ts=0.0, values={"val_loss/prose": 2.0}))
    assert len(sink.open_alerts) == 1
    sink.write(ScalarRecord(step=250, rank=0, ts=0.0, values={"loss": 2.0}))
    assert sink.open_alerts == ()
    assert inner.alerts[-1].cleared_step == 299


def test_a_model_without_moe_layers_still_has_its_scalars_watched() -> None:
    inner = ListSink()
    sink = DeriveSink(inner, ModelInfo(family="dense", layers=()))
    sink.write(ScalarRecord(step=0, rank=0, ts=0.0, values={"loss": math.nan}))
    assert [alert.rule for alert in inner.alerts] == ["NONFINITE"]
    assert sink.failures == 0


def test_going_back_to_a_checkpoint_closes_what_was_undone() -> None:
    inner = ListSink()
    sink = DeriveSink(inner, model(L, E, K))
    for step in range(450):
        sink.write(load_record(step, collapse(step), K))
    assert sink.open_alerts
    sink.write(load_record(300, counts(np.random.default_rng(1)), K))
    assert sink.open_alerts == ()
    closed: list[AlertRecord] = [alert for alert in inner.alerts if alert.cleared_step == 449]
    assert {alert.rule for alert in closed} >= {"ROUTING_COLLAPSE", "LOAD_SKEW"}
