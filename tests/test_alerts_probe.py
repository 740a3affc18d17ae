"""The rules on the fixed probe: each series here must raise its note, or must not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from moeviz.alerts import RULES, AlertConfig, ProbeDetector, RouterDetector, ScalarDetector
from moeviz.alerts.rules import PROBE_RULES
from moeviz.errors import MoevizError
from moeviz.records import (
    AlertRecord,
    LayerInfo,
    MetricRecord,
    ModelInfo,
    ProbeRecord,
    SequenceRecord,
)

TEXT = SequenceRecord(
    step=0,
    rank=0,
    seqs=np.zeros(0),
    token_ids_NS=np.zeros((0, 0)),
    lengths_N=np.zeros(0),
    domains=(),
)


def judge(
    detector: ProbeDetector, step: int, heads: dict[int, Any] | None = None, **values: Sequence[float]
) -> list[AlertRecord]:
    head_entropy = {block: np.array(entropy_H) for block, entropy_H in (heads or {}).items()}
    record = ProbeRecord(step=step, rank=0, sequences=TEXT, routings=(), head_entropy=head_entropy)
    return detector.observe(
        record, MetricRecord(step=step, values={name: np.array(value) for name, value in values.items()})
    )


def churned(
    series: Sequence[float], every: int = 100, steps: Sequence[int] | None = None
) -> list[tuple[str, int]]:
    """(raised or cleared, step) of PROBE_CHURN for a layer with this churn; the first pass has none."""
    detector, seen = ProbeDetector(), []
    judge(detector, 0)
    for at, churn in enumerate(series, start=1):
        step = every * at if steps is None else steps[at - 1]
        for alert in judge(detector, step, churn=[churn]):
            assert alert.rule == "PROBE_CHURN"
            seen.append(("raised" if alert.cleared_step is None else "cleared", step))
    return seen


def test_routing_that_moves_again_is_told_once() -> None:
    settled = [0.5, 0.4, 0.3, 0.25, 0.2, 0.18, 0.17]
    assert churned([*settled, 0.6, 0.2, 0.15]) == [("raised", 800), ("cleared", 900)]


@pytest.mark.parametrize(
    ("what", "series"),
    [
        ("falling", list(np.geomspace(0.8, 0.02, 30))),
        ("level, with noise", list(0.3 + 0.08 * np.random.default_rng(0).standard_normal(200).clip(-3, 3))),
        ("below the floor", [0.01] * 10 + [0.09] * 3),
        ("too little to compare with", [0.1, 0.1, 0.1, 0.1, 0.9]),
        ("never routed", [float("nan")] * 12),
    ],
)
def test_routing_that_settles_is_not(what: str, series: list[float]) -> None:
    assert churned(series) == [], what


def test_passes_that_lie_further_apart_are_not_compared() -> None:
    steps = [100 * at for at in range(1, 9)] + [5000]
    assert churned([0.2] * 8 + [0.7], steps=steps) == [], "the last pass of a run, at whatever step it ends"
    steps = [100 * at for at in range(1, 9)] + [850]
    assert churned([0.2] * 8 + [0.7], steps=steps) == []


def test_each_layer_is_judged_by_its_own_past() -> None:
    detector = ProbeDetector()
    judge(detector, 0)
    for step in range(1, 7):
        judge(detector, step, churn=[0.4, 0.06])
    alerts = judge(detector, 7, churn=[0.5, 0.3])
    assert [(alert.layer, alert.severity) for alert in alerts] == [(1, "info")]
    assert "30%" in alerts[0].message
    assert "6% before" in alerts[0].message
    assert alerts[0].evidence["recent"][-1] == 0.3


@pytest.mark.parametrize("name", ["pes", "router_cos"])
def test_experts_that_do_the_same_are_told_and_cleared(name: str) -> None:
    detector = ProbeDetector()
    assert judge(detector, 0, None, **{name: [0.2, 0.89]}) == []
    raised = judge(detector, 1, None, **{name: [0.2, 0.95]})
    assert [(alert.rule, alert.layer, alert.severity) for alert in raised] == [("EXPERTS_ALIKE", 1, "info")]
    assert ("Experts" if name == "pes" else "The router's rows") in raised[0].message
    assert judge(detector, 2, None, **{name: [0.2, 0.87]}) == [], "between the two lines nothing changes"
    cleared = judge(detector, 3, None, **{name: [0.2, 0.5]})
    assert [alert.cleared_step for alert in cleared] == [3]
    assert not detector.episodes.open_alerts


def test_similarity_that_is_not_known_raises_nothing() -> None:
    detector = ProbeDetector()
    assert judge(detector, 0, pes=[float("nan")] * 2, router_cos=[float("nan"), 0.1]) == []


def test_attention_that_looks_at_one_key_in_most_heads_is_told() -> None:
    detector = ProbeDetector()
    half = {0: [0.01, 0.5], 1: [0.02, 0.6]}
    assert judge(detector, 0, half) == [], "half of the heads is not more than half"
    raised = judge(detector, 100, {0: [0.01, 0.5], 1: [0.02, 0.03]})
    assert [(alert.rule, alert.layer, alert.value) for alert in raised] == [
        ("ATTENTION_COLLAPSED", None, 0.75)
    ]
    assert "3 of 4 heads" in raised[0].message
    assert "0.0, 1.0, 1.1" in raised[0].message
    assert judge(detector, 200, half) == []
    assert judge(detector, 300, {0: [0.4, 0.5], 1: [0.02, 0.6]})[0].cleared_step == 300


def test_thresholds_are_configurable() -> None:
    detector = ProbeDetector(AlertConfig().with_thresholds(["alike_line=0.3", "alike_clear=0.2"]))
    assert len(judge(detector, 0, pes=[0.4])) == 1
    with pytest.raises(MoevizError, match="churn_passes=0"):
        AlertConfig(churn_passes=0)


def test_open_notes_of_an_earlier_attempt_are_adopted_by_this_detector_alone() -> None:
    first = ProbeDetector()
    raised = judge(first, 0, {0: [0.0, 0.0]}, pes=[0.95])
    assert len(raised) == 2
    layer = LayerInfo(layer=0, name="gate", block=0, num_experts=4, top_k=2)
    routers, scalars = RouterDetector(ModelInfo(family="test", layers=(layer,))), ScalarDetector()
    second = ProbeDetector()
    for detector in (routers, scalars, second):
        detector.restore(raised)
    assert routers.episodes.open_alerts == scalars.episodes.open_alerts == ()
    assert {alert.rule for alert in second.episodes.open_alerts} == {"EXPERTS_ALIKE", "ATTENTION_COLLAPSED"}
    cleared = judge(second, 100, {0: [0.9, 0.9]}, pes=[0.1])
    assert {alert.episode for alert in cleared} == {alert.episode for alert in raised}


def test_undone_passes_close_their_notes() -> None:
    detector = ProbeDetector()
    judge(detector, 500, pes=[0.95])
    assert [alert.rule for alert in detector.rewind(400, 500)] == ["EXPERTS_ALIKE"]


def test_probe_rules_are_rules() -> None:
    known = {rule.id: rule for rule in RULES}
    assert not PROBE_RULES - known.keys()
    assert {known[each].severity for each in PROBE_RULES} == {"info"}
