"""The load rules on simulated routing: what they must see, how soon, and what they must leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from metrics_routing import load_record, model

from moeviz.alerts import AlertConfig, RouterDetector, RunPlan
from moeviz.records import AlertRecord, LayerInfo, ModelInfo

L, E, K, N = 3, 8, 2, 2048
AFTER_START = 400


def draw(rng: np.random.Generator, coverage_E: np.ndarray, layers: int = L, tokens: int = N) -> np.ndarray:
    """Counts of independent tokens with the given coverage, int64 [layers, E]; rows sum to tokens x k."""
    top_k = round(float(coverage_E.sum()))
    counts_LE = rng.binomial(tokens, np.minimum(coverage_E, 1), size=(layers, len(coverage_E)))
    counts_LE[:, int(coverage_E.argmax())] += tokens * top_k - counts_LE.sum(axis=-1)
    return counts_LE


def even(num_experts: int = E, top_k: int = K) -> np.ndarray:
    return np.full(num_experts, top_k / num_experts)


def collapsed(num_experts: int = E, top_k: int = K) -> np.ndarray:
    return np.r_[np.full(top_k, 1.0), np.zeros(num_experts - top_k)]


def without_one(num_experts: int = E, top_k: int = K, dead: int = 5) -> np.ndarray:
    coverage_E = np.full(num_experts, top_k / (num_experts - 1))
    coverage_E[dead] = 0
    return coverage_E


class Run:
    """A detector and the routing it sees, step by step."""

    def __init__(
        self, config: AlertConfig | None = None, plan: RunPlan | None = None, layers: int = L
    ) -> None:
        self.detector = RouterDetector(model(layers, E, K), config, plan)
        self.rng = np.random.default_rng(0)
        self.layers = layers
        self.step = 0
        self.alerts: list[AlertRecord] = []

    def feed(self, coverage_E: np.ndarray, steps: int) -> list[AlertRecord]:
        """Feed `steps` records; returns the transitions that they caused."""
        new = []
        for _ in range(steps):
            record = load_record(self.step, draw(self.rng, coverage_E, self.layers), K)
            new += self.detector.observe(record)
            self.step += 1
        self.alerts += new
        return new


def raised(alerts: list[AlertRecord], rule: str) -> list[AlertRecord]:
    return [alert for alert in alerts if alert.rule == rule and alert.updated_step == alert.raised_step]


def test_balanced_routing_raises_nothing() -> None:
    assert Run().feed(even(), 1000) == []


def test_sudden_collapse_is_critical_within_thirty_steps_in_every_layer() -> None:
    run = Run()
    run.feed(even(), AFTER_START)
    alerts = run.feed(collapsed(), 30)
    collapse = raised(alerts, "ROUTING_COLLAPSE")
    assert [alert.layer for alert in collapse] == list(range(L))
    assert {alert.severity for alert in collapse} == {"critical"}
    assert all(alert.raised_step - AFTER_START < 30 for alert in collapse)
    skew = raised(alerts, "LOAD_SKEW")
    assert len(skew) == L
    assert skew[0].raised_step < collapse[0].raised_step
    assert collapse[0].value > collapse[0].threshold
    assert "2." in collapse[0].message
    assert "loss will not show" in collapse[0].remedy


def test_one_dead_expert_is_starved_then_dead_and_named() -> None:
    run = Run()
    run.feed(even(), AFTER_START)
    alerts = run.feed(without_one(dead=5), 140)
    starved, dead = raised(alerts, "EXPERT_STARVED"), raised(alerts, "EXPERT_DEAD")
    assert len(starved) == len(dead) == L
    assert all(alert.experts == (5,) for alert in starved + dead)
    assert all(alert.raised_step - AFTER_START < 90 for alert in starved)
    assert all(alert.raised_step - AFTER_START < 140 for alert in dead)
    assert {alert.severity for alert in starved} == {"warning"}
    assert {alert.severity for alert in dead} == {"error"}
    assert raised(alerts, "ROUTING_COLLAPSE") == []
    assert "Expert 5" in dead[0].message
    assert f"step {dead[0].evidence['since']}" in dead[0].remedy


def test_an_episode_is_raised_once_and_cleared_after_it_has_been_calm() -> None:
    run = Run()
    run.feed(even(), AFTER_START)
    run.feed(collapsed(), 200)
    healed_at = run.step
    run.feed(even(), 150)
    for rule in ("ROUTING_COLLAPSE", "LOAD_SKEW", "EXPERT_STARVED", "EXPERT_DEAD"):
        mine = [alert for alert in run.alerts if alert.rule == rule and alert.layer == 1]
        assert len({alert.episode for alert in mine}) == 1, rule
        assert mine[0].cleared_step is None
        assert mine[-1].cleared_step is not None
        assert mine[-1].cleared_step - healed_at >= run.detector.config.clear_after
        assert mine[0].episode == f"{rule}/1/{mine[0].raised_step}"
    assert not [alert for alert in run.detector.episodes.open_alerts if alert.severity != "info"]


def test_start_up_imbalance_is_capped_and_then_promoted() -> None:
    run = Run()
    early = run.feed(collapsed(), 300)
    assert {alert.severity for alert in early} == {"warning"}
    assert all(alert.message.startswith("Start-up imbalance.") for alert in raised(early, "ROUTING_COLLAPSE"))
    (promoted, *_) = [a for a in run.feed(collapsed(), 1) if a.rule == "ROUTING_COLLAPSE" and a.layer == 0]
    assert promoted.severity == "critical"
    assert promoted.raised_step < promoted.updated_step == 300
    assert promoted.episode == raised(early, "ROUTING_COLLAPSE")[0].episode
    assert not promoted.message.startswith("Start-up")


def test_start_up_imbalance_that_heals_never_becomes_critical() -> None:
    run = Run()
    run.feed(collapsed(), 120)
    run.feed(even(), 400)
    assert {alert.severity for alert in run.alerts} == {"warning"}
    assert run.detector.episodes.open_alerts == ()


def test_a_longer_warm_up_lengthens_the_start_up_window() -> None:
    assert RunPlan(warmup_steps=200).startup_end(AlertConfig()) == 600
    assert RunPlan(warmup_steps=10).startup_end(AlertConfig()) == 300


def test_nothing_is_judged_before_the_statistics_are_armed() -> None:
    run = Run()
    assert run.feed(collapsed(), AlertConfig().arm_after + AlertConfig().raise_after - 2) == []
    assert run.feed(collapsed(), 2)


def test_swinging_loads_raise_oscillation_and_nothing_graver() -> None:
    run = Run()
    run.feed(even(), AFTER_START)
    swing_E = 0.5 * even() * np.where(np.arange(E) % 2, 1, -1)
    alerts: list[AlertRecord] = []
    for step in range(20):
        alerts += run.feed(even() + swing_E * (-1) ** step, 1)
    found = raised(alerts, "BIAS_OSCILLATION")
    assert [alert.layer for alert in found] == list(range(L))
    assert {alert.rule for alert in alerts if alert.severity != "info"} == {"BIAS_OSCILLATION"}


def loss_free_run(bias_step: float, steps: int, tokens: int = 1024, habit: float = 0.0) -> list[AlertRecord]:
    """Sigmoid scores of random tokens, top-k of score + bias, and the sign rule b += u sign(mean c - c).

    `habit`: spread of what the 64 tokens of a sequence have in common.
    """
    rng = np.random.default_rng(3)
    detector = RouterDetector(model(1, E, K, score="sigmoid", has_bias=True))
    lean_E, bias_E = rng.normal(size=E) * 0.3, np.zeros(E)
    alerts: list[AlertRecord] = []
    for step in range(steps):
        common_TE = np.repeat(rng.normal(size=(tokens // 64, E)) * habit, 64, axis=0)
        scores_TE = 1 / (1 + np.exp(-(rng.normal(size=(tokens, E)) + lean_E + common_TE)))
        chosen_TK = np.argpartition(-(scores_TE + bias_E), K, axis=1)[:, :K]
        counts_E = np.bincount(chosen_TK.ravel(), minlength=E)
        bias_E = bias_E + bias_step * np.sign(counts_E.mean() - counts_E)
        alerts += detector.observe(
            load_record(step, counts_E[None], K, bias_LE=bias_E[None].astype(np.float32))
        )
    return alerts


def test_a_bias_step_that_is_too_large_oscillates_and_a_proper_one_does_not() -> None:
    assert loss_free_run(1e-3, 250) == []
    assert loss_free_run(1e-3, 120, tokens=16_384) == []
    assert loss_free_run(1e-2, 200, habit=0.7) == []
    for habit in (0.0, 0.7):
        alerts = loss_free_run(0.1, 120, habit=habit)
        assert {alert.rule for alert in alerts} == {"BIAS_OSCILLATION"}
        assert "u = 0.1" in alerts[0].message


def drifting(steps: int, num_experts: int = E, top_k: int = K) -> Iterator[np.ndarray]:
    """Coverage that slowly leaves the even one: logits that separate linearly."""
    lean_E = np.linspace(-1, 1, num_experts)
    for step in range(steps):
        share_E = np.exp(3 * step / steps * lean_E)
        yield np.minimum(top_k * share_E / share_E.sum(), 1)


def test_a_slow_drift_is_noted_long_before_any_line_is_crossed() -> None:
    run = Run(layers=2)
    run.feed(even(), AFTER_START)
    for coverage_E in drifting(1500):
        run.feed(coverage_E, 1)
    drift = raised(run.alerts, "LOAD_DRIFT")
    warnings = [alert for alert in run.alerts if alert.severity != "info"]
    assert {alert.layer for alert in drift} == {0, 1}
    assert warnings[0].raised_step - max(alert.raised_step for alert in drift) > 100
    assert all(AFTER_START <= alert.evidence["since"] < alert.raised_step for alert in drift)


def test_drift_is_measured_from_the_best_stretch_not_from_the_start() -> None:
    """A run that starts out of balance, heals and then loses half of what it gained has drifted."""
    skewed_E = 0.4 * collapsed() + 0.6 * even()
    half_E = 0.25 * collapsed() + 0.75 * even()
    run = Run()
    run.feed(skewed_E, 300)
    run.feed(even(), 500)
    assert raised(run.alerts, "LOAD_DRIFT") == []
    assert len(raised(run.feed(half_E, 60), "LOAD_DRIFT")) == L


def test_layers_of_different_width_are_judged_by_their_own_lines() -> None:
    layers = (
        LayerInfo(layer=0, name="a", block=0, num_experts=4, top_k=1),
        LayerInfo(layer=1, name="b", block=1, num_experts=16, top_k=2),
        LayerInfo(layer=2, name="dense", block=2, num_experts=2, top_k=2),
    )
    detector = RouterDetector(ModelInfo(family="test", layers=layers))
    rng = np.random.default_rng(0)
    alerts: list[AlertRecord] = []
    for step in range(600):
        wide_E = without_one(16, 2, dead=9) if step >= AFTER_START else even(16, 2)
        counts_LE = np.zeros((3, 16), dtype=np.int64)
        counts_LE[0, :4] = draw(rng, even(4, 1), 1)[0]
        counts_LE[1] = draw(rng, wide_E, 1)[0]
        counts_LE[2, :2] = N
        alerts += detector.observe(load_record(step, counts_LE, 1))
    assert {alert.layer for alert in alerts} == {1}
    assert {alert.experts for alert in alerts if alert.experts} == {(9,)}


def test_a_layer_without_assignments_keeps_its_state() -> None:
    run = Run()
    run.feed(even(), AFTER_START)
    before_E = run.detector.statistics.mean_LE[1].copy()
    counts_LE = draw(run.rng, even())
    counts_LE[1] = 0
    assert run.detector.observe(load_record(run.step, counts_LE, K)) == []
    np.testing.assert_array_equal(run.detector.statistics.mean_LE[1], before_E)
    assert run.detector.statistics.seen_L.tolist() == [AFTER_START + 1, AFTER_START, AFTER_START + 1]
    assert run.feed(even(), 100) == []


def test_permuting_the_experts_changes_only_their_names() -> None:
    order_E = np.random.default_rng(1).permutation(E)
    plain, permuted = RouterDetector(model(1, E, K)), RouterDetector(model(1, E, K))
    rng = np.random.default_rng(2)
    for step in range(AFTER_START + 120):
        counts_LE = draw(rng, without_one(dead=3) if step >= AFTER_START else even(), 1)
        first = plain.observe(load_record(step, counts_LE, K))
        second = permuted.observe(load_record(step, counts_LE[:, order_E], K))
        assert [alert.episode for alert in first] == [alert.episode for alert in second]
        for ours, theirs in zip(first, second, strict=True):
            assert ours.value == pytest.approx(theirs.value)
            assert ours.experts == tuple(int(order_E[expert]) for expert in theirs.experts)
    assert plain.episodes.open_alerts


def test_correlated_tokens_are_told_from_imbalance() -> None:
    """Tokens in clusters of eight: D is found, and a swing that would be a signal at D = 1 is noise."""
    run = Run()
    clustered = 8
    for step in range(600):
        counts_LE = clustered * draw(run.rng, even(), L, N // clustered)
        assert run.detector.observe(load_record(step, counts_LE, K)) == []
    assert np.median(run.detector.statistics.design_effect_L) == pytest.approx(clustered, rel=0.3)


def test_independent_tokens_have_no_design_effect() -> None:
    run = Run()
    run.feed(even(), 600)
    np.testing.assert_allclose(run.detector.statistics.design_effect_L, 1, atol=0.25)


def test_an_alternation_does_not_pass_for_noise() -> None:
    run = Run()
    run.feed(even(), AFTER_START)
    # Successive differences alone would read 0.5 / 0.038 squared: a design effect above 100.
    for step in range(100):
        run.feed(even() * (1 + 0.5 * np.where(np.arange(E) % 2, 1, -1) * (-1) ** step), 1)
    np.testing.assert_allclose(run.detector.statistics.design_effect_L, 1, atol=0.8)


def test_open_alerts_report_a_worse_peak_but_not_every_step() -> None:
    run = Run(layers=1)
    run.feed(even(), AFTER_START)
    run.feed(0.65 * collapsed() + 0.35 * even(), 100)
    alerts = run.feed(collapsed(), 300)
    skew = [alert for alert in run.alerts if alert.rule == "LOAD_SKEW"]
    assert len({alert.episode for alert in skew}) == 1
    assert 2 <= len(skew) <= 8
    peaks = [alert.peak for alert in skew]
    assert peaks == sorted(peaks)
    assert all(b.updated_step - a.updated_step >= 50 for a, b in pairwise(skew))
    assert alerts


def test_thresholds_can_be_overridden() -> None:
    milder = 0.45 * collapsed() + 0.55 * even()
    for config, expected in ((AlertConfig(), set()), (AlertConfig(skew_excess=0.3), {"LOAD_SKEW"})):
        run = Run(config)
        run.feed(milder, 200)
        assert {alert.rule for alert in run.alerts} == expected


def test_stray_tokens_do_not_bring_a_dead_expert_back_to_life() -> None:
    """A few tokens every ninth step lift the smoothed load over the dead line again and again, within its noise."""
    run = Run()
    run.feed(even(), AFTER_START)
    gone, stray = without_one(dead=5), without_one(dead=5) * (K - 0.034) / K
    stray[5] = 0.034
    alerts, lowest = [], []
    for step in range(140):
        alerts += run.feed(stray if step % 9 == 0 else gone, 1)
        lowest.append(run.detector.statistics.mean_LE[0, 5])
    assert max(lowest[70:]) > AlertConfig().dead_line > min(lowest[70:])
    assert [alert.layer for alert in raised(alerts, "EXPERT_DEAD")] == list(range(L))
