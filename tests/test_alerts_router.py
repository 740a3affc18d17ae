"""Rules about bias, drops, logits and early hardening: raised, escalated, silent without their numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from metrics_routing import load_record, model

from moeviz.alerts import AlertConfig, RouterDetector, RunPlan
from moeviz.records import AlertRecord

L, E, K, N = 2, 8, 2, 1024
EVEN_LE = np.full((L, E), N * K // E)
UNEVEN_LE = np.tile([512, 512, 256, 256, 128, 128, 128, 128], (L, 1))
"""N_eff 6.7 of 8: uneven, within the lines of every load rule."""


def feed(
    detector: RouterDetector, steps: range, counts_LE: np.ndarray = EVEN_LE, **fields: Any
) -> list[AlertRecord]:
    alerts = []
    for step in steps:
        values = {name: value(step) if callable(value) else value for name, value in fields.items()}
        alerts += detector.observe(load_record(step, counts_LE, K, **values))
    return alerts


def sums(**means: float) -> dict[str, np.ndarray]:
    return {name: np.full(L, mean * N, dtype=np.float32) for name, mean in means.items()}


def test_a_plain_model_raises_nothing() -> None:
    assert feed(RouterDetector(model(L, E, K)), range(300)) == []


@pytest.mark.parametrize(("score", "expected"), [("sigmoid", 1), ("softmax", 1), ("unknown", 0)])
def test_a_bias_that_outweighs_the_scores_is_told_with_its_step(score: str, expected: int) -> None:
    detector = RouterDetector(model(L, E, K, score=score, has_bias=True))

    def bias(step: int) -> np.ndarray:
        bias_LE = np.zeros((L, E), dtype=np.float32)
        bias_LE[1, 0] = 0.005 * step
        return bias_LE

    alerts = feed(detector, range(200), UNEVEN_LE, bias_LE=bias)
    assert [alert.layer for alert in alerts if alert.raised_step == alert.updated_step] == [1] * expected
    if expected:
        assert alerts[0].rule == "BIAS_SATURATED"
        assert alerts[0].value > alerts[0].threshold == 0.5
        assert "u = 0.005" in alerts[0].message


def test_a_bias_in_logit_space_is_compared_with_the_logits() -> None:
    bias_LE = np.zeros((L, E), dtype=np.float32)
    bias_LE[:, 0] = 4.0
    fields = {"bias_LE": bias_LE}
    info = model(L, E, K, score="softmax_topk", has_bias=True)
    assert (
        feed(RouterDetector(info), range(100), UNEVEN_LE, **fields, token_sums=sums(logit_squared=4.0)) == []
    )
    alerts = feed(RouterDetector(info), range(100), UNEVEN_LE, **fields, token_sums=sums(logit_squared=1.0))
    assert {(alert.rule, alert.value) for alert in alerts} == {("BIAS_SATURATED", 4.0)}


def test_a_large_bias_that_keeps_the_load_even_is_no_alert() -> None:
    bias_LE = np.zeros((L, E), dtype=np.float32)
    bias_LE[:, 0] = 0.9
    detector = RouterDetector(model(L, E, K, score="sigmoid", has_bias=True))
    assert feed(detector, range(300), bias_LE=bias_LE) == []
    later = feed(detector, range(300, 400), UNEVEN_LE, bias_LE=bias_LE)
    later += feed(detector, range(400, 500), bias_LE=bias_LE)
    mine = [alert for alert in later if alert.rule == "BIAS_SATURATED"]
    assert [alert.cleared_step is None for alert in mine] == [True] * L + [False] * L


def test_drops_are_compared_with_a_balanced_routers_and_escalate() -> None:
    detector = RouterDetector(model(L, E, K), plan=RunPlan(capacity_factor=1.0))

    def dropped(step: int) -> np.ndarray:
        dropped_LE = np.zeros((L, E), dtype=np.int64)
        dropped_LE[0, 0] = N * K * (0.02 if step < 350 else 0.05 if step < 400 else 0.2)
        return dropped_LE

    alerts = feed(detector, range(450), dropped_LE=dropped)
    assert [(alert.rule, alert.layer, alert.severity) for alert in alerts] == [
        ("TOKENS_DROPPED", 0, "warning"),
        ("TOKENS_DROPPED", 0, "error"),
    ]
    warning, error = alerts
    assert 350 <= warning.raised_step < 362
    assert error.episode == warning.episode
    assert error.updated_step >= 409
    assert "5.0%" in warning.message
    assert "2.2%" in warning.message  # a balanced router at cf = 1: sd(r) phi(0) = 0.054 x 0.399


def test_large_logits_warn_then_become_critical_then_clear() -> None:
    detector = RouterDetector(model(L, E, K))

    def logits(step: int) -> dict[str, np.ndarray]:
        size = 16 if step < 100 else 32 if step < 200 else 5
        return sums(lse_squared=size**2)

    alerts = feed(detector, range(300), token_sums=logits)
    mine = [alert for alert in alerts if alert.layer == 0]
    assert [(alert.severity, alert.cleared_step is None) for alert in mine] == [
        ("warning", True),
        ("critical", True),
        ("critical", False),
    ]
    assert {alert.rule for alert in alerts} == {"ROUTER_LOGITS"}
    assert "0.06" in mine[0].message


def test_logits_that_double_within_the_window_warn_before_they_are_large() -> None:
    at_rest = np.log(E)

    def growing(step: int) -> dict[str, np.ndarray]:
        return sums(lse_squared=(at_rest * (1 + step / 500)) ** 2)

    def slow(step: int) -> dict[str, np.ndarray]:
        return sums(lse_squared=(at_rest * (1 + step / 5000)) ** 2)

    fast = feed(RouterDetector(model(L, E, K)), range(0, 1000, 5), token_sums=growing)
    assert fast[0].rule == "ROUTER_LOGITS"
    assert fast[0].value < 15
    assert feed(RouterDetector(model(L, E, K)), range(0, 5000, 10), token_sums=slow) == []


def test_a_router_that_decides_early_is_noted_only_early() -> None:
    hard = {"token_sums": sums(entropy_nats=0.05 * np.log(E))}
    early = RouterDetector(model(L, E, K), plan=RunPlan(planned_steps=5000))
    alerts = feed(early, range(100), **hard)
    assert {(alert.rule, alert.severity, alert.layer) for alert in alerts} == {
        ("ROUTER_HARDENED", "info", 0),
        ("ROUTER_HARDENED", "info", 1),
    }
    late = RouterDetector(model(L, E, K), plan=RunPlan(planned_steps=500))
    assert feed(late, range(60, 200), **hard) == []
    unknown = RouterDetector(model(L, E, K))
    assert feed(unknown, range(100), **hard) == []


def test_a_value_that_is_not_finite_is_critical_at_once_and_stays() -> None:
    detector = RouterDetector(model(L, E, K))
    prob_sum_LE = np.full((L, E), N / E, dtype=np.float32)
    prob_sum_LE[1, 3] = np.nan
    assert feed(detector, range(5), prob_sum_LE=np.full((L, E), N / E)) == []
    (alert,) = feed(detector, range(5, 6), prob_sum_LE=prob_sum_LE)
    assert (alert.rule, alert.severity, alert.layer, alert.raised_step) == ("NONFINITE", "critical", 1, 5)
    assert feed(detector, range(6, 200), prob_sum_LE=np.full((L, E), N / E)) == []
    assert len(detector.episodes.open_alerts) == 1


def test_a_negative_threshold_is_refused_with_its_name() -> None:
    with pytest.raises(ValueError, match="dead_line=-1"):
        AlertConfig(dead_line=-1)
    with pytest.raises(ValueError, match="raise_after=0"):
        AlertConfig(raise_after=0)
