"""Judging steps together says what judging them one by one says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from metrics_routing import ListSink, load_record

from moeviz.alerts import AlertConfig, RunPlan
from moeviz.derive import DeriveSink
from moeviz.records import AlertRecord, LayerInfo, LoadRecord, MetricRecord, ModelInfo, Record, ScalarRecord

WIDTHS, K, N = (8, 8, 5), 2, 512
L, E = len(WIDTHS), max(WIDTHS)
INFO = ModelInfo(
    family="t",
    layers=tuple(
        LayerInfo(layer=layer, name=str(layer), block=layer, num_experts=width, top_k=K, score=score)
        for layer, (width, score) in enumerate(
            zip(WIDTHS, ("sigmoid", "softmax_topk", "softmax"), strict=True)
        )
    ),
)


def loads(rng: np.random.Generator, step: int, phase: str) -> LoadRecord:
    shares = np.zeros((L, E))
    for layer, width in enumerate(WIDTHS):
        shares[layer, :width] = 1 / width
        if phase == "collapsed" and layer < 2:
            shares[layer] = np.r_[0.5, 0.5, np.zeros(E - 2)]
        if phase == "swinging":
            shares[layer, :width] *= 1 + 0.6 * (-1) ** (np.arange(width) + step // 2)
            shares[layer] /= shares[layer].sum()
    counts_LE = np.stack([rng.multinomial(N * K, share_E) for share_E in shares])
    values: dict[str, Any] = {
        "prob_sum_LE": (shares * N).astype(np.float32),
        "weight_sum_LE": (counts_LE / K).astype(np.float32),
        "bias_LE": rng.normal(size=(L, E)).astype(np.float32) * (3.0 if phase == "collapsed" else 0.01),
        "dropped_LE": counts_LE // 3 if phase == "dropping" else np.zeros_like(counts_LE),
        "token_sums": {
            "entropy_nats": np.full(L, 0.05 * N if phase == "hard" else 1.5 * N, dtype=np.float32),
            "lse_squared": rng.uniform(2, 900 if phase == "hard" else 5, L).astype(np.float32) * N,
            "confidence": np.full(L, 0.3 * N, dtype=np.float32),
            "margin": np.array([0.1 * N, np.nan, 0.2 * N], dtype=np.float32),
            "logit_squared": np.full(L, 1.0 * N, dtype=np.float32),
        },
    }
    if phase == "bare":
        values = {}
    if phase == "broken":
        values["token_sums"]["lse_squared"][1] = np.inf
    return load_record(step, counts_LE, K, **values)


def story() -> Iterator[Record]:
    """A run in which every kind of rule has something to say, with gaps, a way back, and steps without tokens."""
    rng = np.random.default_rng(0)
    phases = ["even"] * 420 + ["collapsed"] * 120 + ["even"] * 200 + ["dropping"] * 60 + ["swinging"] * 250
    phases += ["bare"] * 20 + ["hard"] * 60 + ["broken"] * 3 + ["even"] * 60
    for step, phase in enumerate(phases):
        record = loads(rng, 2 * step, phase)
        yield replace(record, tokens=0) if step % 100 == 99 else record
        if step % 50 == 0:
            yield ScalarRecord(step=2 * step, rank=0, ts=0.0, values={"loss": 2.0})
    for step in range(900, 1100):  # back to before the collapse ended
        yield loads(rng, step, "collapsed" if step < 960 else "even")


CONFIG = AlertConfig(circulating=True)
PLAN = RunPlan(planned_steps=100_000, z_coef=1e-3)


def told(together: int, flush_every: int) -> ListSink:
    sink = ListSink()
    derive = DeriveSink(sink, INFO, config=CONFIG, plan=PLAN, together=together)
    for number, record in enumerate(story()):
        derive.write(record)
        if number % flush_every == flush_every - 1:
            derive.flush()
    derive.close()
    assert derive.failures == 0
    return sink


@pytest.mark.parametrize(("together", "flush_every"), [(64, 37), (7, 10_000), (10_000, 500)])
def test_blocks_tell_what_single_steps_tell(together: int, flush_every: int) -> None:
    alone, blocks = told(1, 1), told(together, flush_every)
    for one, other in zip(alone.of(MetricRecord), blocks.of(MetricRecord), strict=True):
        assert one.step == other.step
        assert one.values.keys() == other.values.keys()
        for name, value_L in one.values.items():
            np.testing.assert_allclose(other.values[name], value_L, rtol=2e-6, atol=1e-7, err_msg=name)
    assert [_said(alert) for alert in alone.alerts] == [_said(alert) for alert in blocks.alerts]
    for one, other in zip(alone.alerts, blocks.alerts, strict=True):
        for name in ("value", "peak", "threshold"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-9, abs=1e-12, nan_ok=True)
    rules = {alert.rule for alert in alone.alerts}
    expected = {"ROUTING_COLLAPSE", "EXPERT_DEAD", "EXPERT_STARVED", "LOAD_SKEW", "BIAS_OSCILLATION"}
    expected |= {"BIAS_SATURATED", "TOKENS_DROPPED", "ROUTER_LOGITS", "ROUTER_HARDENED", "NONFINITE"}
    assert rules >= expected
    assert any(alert.cleared_step is not None for alert in alone.alerts)


def _said(alert: AlertRecord) -> tuple[object, ...]:
    keys = ("episode", "rule", "layer", "experts", "severity", "raised_step", "updated_step", "cleared_step")
    return (*(getattr(alert, key) for key in keys), alert.message, alert.remedy, alert.evidence.get("since"))


def test_what_follows_is_told_by_the_next_flush_and_after_the_records_themselves() -> None:
    rng, sink = np.random.default_rng(0), ListSink()
    derive = DeriveSink(sink, INFO, together=64)
    records = [loads(rng, step, "even") for step in range(5)]
    for record in records:
        derive.write(record)
    assert sink.records == records
    derive.flush()
    assert [record.step for record in sink.of(MetricRecord)] == [0, 1, 2, 3, 4]
    derive.flush()
    assert len(sink.records) == 10


def test_wide_layers_are_judged_in_small_groups() -> None:
    layers = tuple(LayerInfo(layer=i, name=str(i), block=i, num_experts=128, top_k=8) for i in range(24))
    rng, sink = np.random.default_rng(0), ListSink()
    derive = DeriveSink(sink, ModelInfo(family="t", layers=layers), together=64)
    for step in range(12):
        derive.write(load_record(step, rng.multinomial(4096, np.full(128, 1 / 128), size=24), 8))
    assert len(sink.of(MetricRecord)) == 10


def test_a_refusal_in_the_middle_costs_nothing_behind_it() -> None:
    class Refusing(ListSink):
        flushes = 0

        def flush(self) -> None:
            self.flushes += 1

        def write(self, record: Any) -> None:
            if isinstance(record, MetricRecord) and record.step == 1:
                raise OSError("disk full")
            super().write(record)

    rng, sink = np.random.default_rng(0), Refusing()
    derive = DeriveSink(sink, INFO, together=64)
    for step in range(4):
        derive.write(loads(rng, step, "even"))
    with pytest.raises(OSError, match="disk full"):
        derive.flush()
    assert [record.step for record in sink.of(MetricRecord)] == [0, 2, 3]
    assert sink.flushes == 1


def test_a_record_of_another_form_costs_its_neighbours_nothing() -> None:
    rng, sink = np.random.default_rng(0), ListSink()
    derive = DeriveSink(sink, INFO, together=64)
    for step in range(6):
        wrong = load_record(step, np.ones((L + 1, E), dtype=np.int64), K)
        derive.write(wrong if step == 3 else loads(rng, step, "even"))
    derive.close()
    assert [record.step for record in sink.of(MetricRecord)] == [0, 1, 2, 4, 5]
    assert derive.failures == 1
