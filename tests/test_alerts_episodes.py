"""Persistence, hysteresis, the order of alerts, and many layers told as one."""

from __future__ import annotations

import string

import numpy as np

from moeviz.alerts import RULES, SEVERITIES, grouped, latest, rule
from moeviz.alerts.latch import Latch
from moeviz.records import AlertRecord


def latch_run(raises: str, clears: str, raise_after: int = 3, clear_after: int = 2) -> str:
    """State after each record of a latch of one rule and layer, as `-` and `#`; `1` is a condition that holds."""
    latch = Latch(np.array([raise_after]), np.array([clear_after]), 1)
    states = ""
    for step, (up, down) in enumerate(zip(raises, clears, strict=True)):
        latch.update(np.array([[up == "1"]]), np.array([[down == "1"]]), np.array([[True]]), step)
        states += "#" if latch.active_RL[0, 0] else "-"
    return states


def test_a_condition_must_persist_to_raise() -> None:
    assert latch_run("110111", "000000") == "-----#"


def test_the_looser_condition_must_persist_to_clear() -> None:
    assert latch_run("1110000000", "0000101100") == "--#####---"


def test_between_the_two_conditions_nothing_changes() -> None:
    assert latch_run("111" + "0" * 20, "0" * 23) == "--" + "#" * 21


def test_what_is_not_judged_does_not_count() -> None:
    latch = Latch(np.array([2]), np.array([2]), 2)
    yes, no = np.array([[True, True]]), np.array([[False, False]])
    for step in range(5):
        raised, _ = latch.update(yes, no, np.array([[True, step == 4]]), step)
        if step == 1:
            assert raised.tolist() == [[0, 0]]
    assert latch.active_RL.tolist() == [[True, False]]
    assert latch.since_RL.tolist() == [[0, 4]]


def latch_steps(raises: str, keeps: str, weight: float, raise_after: int = 4) -> list[int]:
    """Steps at which a latch of one rule raises, with rows that are kept and records that count for `weight`."""
    latch = Latch(np.array([raise_after]), np.array([99]), 1)
    found = []
    for step, (up, keep) in enumerate(zip(raises, keeps, strict=True)):
        yes, no = np.array([[True]]), np.array([[False]])
        raised, _ = latch.update(
            np.array([[up == "1"]]),
            no,
            yes,
            step,
            keep_RL=np.array([[keep == "1"]]),
            weight_RL=np.array([[weight]]),
        )
        found += [step] * len(raised)
    return found


def test_a_kept_row_goes_on_but_does_not_begin() -> None:
    assert latch_steps("1011", "0100", 1.0) == [3]
    assert latch_steps("1011", "0000", 1.0) == []
    assert latch_steps("0000", "1111", 1.0) == []


def test_stronger_evidence_persists_for_fewer_records() -> None:
    assert latch_steps("111111", "000000", 2.0) == [1]
    assert latch_steps("111111", "000000", 1.5) == [2]


def alert(
    rule_id: str, layer: int | None, step: int, cleared: int | None = None, **fields: object
) -> AlertRecord:
    values: dict = {
        "episode": f"{rule_id}/{layer}/{step}",
        "rule": rule_id,
        "rule_version": 1,
        "layer": layer,
        "experts": (),
        "severity": rule(rule_id).severity,
        "raised_step": step,
        "updated_step": cleared or step,
        "cleared_step": cleared,
        "value": 1.0,
        "peak": 1.0,
        "threshold": 1.0,
        "message": f"{rule_id} in {layer}",
        "remedy": "do something",
    }
    return AlertRecord(**(values | fields))


def test_the_latest_record_of_an_episode_is_its_state() -> None:
    records = [
        alert("LOAD_SKEW", 0, 10),
        alert("ROUTING_COLLAPSE", 0, 20, severity="warning"),
        alert("LOAD_SKEW", 1, 30),
        alert("LOAD_SKEW", 0, 10, cleared=90),
        alert("ROUTING_COLLAPSE", 0, 20, severity="critical"),
        alert("LOAD_SKEW", 2, 5, cleared=40),
    ]
    states = [(a.rule, a.layer, a.severity, a.cleared_step) for a in latest(records)]
    assert states == [
        ("ROUTING_COLLAPSE", 0, "critical", None),
        ("LOAD_SKEW", 1, "warning", None),
        ("LOAD_SKEW", 0, "warning", 90),
        ("LOAD_SKEW", 2, "warning", 40),
    ]


def test_a_rule_in_more_than_half_of_the_layers_is_one_line() -> None:
    records = [alert("LOAD_SKEW", layer, 10 + layer) for layer in range(5)]
    records += [alert("EXPERT_DEAD", layer, 50) for layer in (1, 3)]
    records += [alert("LOSS_SPIKE", None, 70), alert("LOAD_DRIFT", 2, 1, cleared=9)]
    groups = grouped(records, num_layers=8)
    assert [(group.rule, group.layers) for group in groups] == [
        ("EXPERT_DEAD", (1,)),
        ("EXPERT_DEAD", (3,)),
        ("LOAD_SKEW", (0, 1, 2, 3, 4)),
        ("LOSS_SPIKE", ()),
    ]
    assert groups[2].first_step == 10
    assert "5 of 8 layers" in groups[2].message


def test_half_of_the_layers_is_not_more_than_half() -> None:
    records = [alert("LOAD_SKEW", layer, 10) for layer in range(4)]
    assert len(grouped(records, num_layers=8)) == 4
    assert len(grouped(records, num_layers=7)) == 1


def test_rules_are_complete_and_their_words_use_known_facts() -> None:
    assert len({row.id for row in RULES}) == len(RULES)
    known = {
        "layer",
        "step",
        "since",
        "value",
        "threshold",
        "num_experts",
        "n_eff",
        "lowest",
        "lowest_share",
        "busiest",
        "busiest_coverage",
        "others",
        "expected_drop",
        "swing_cause",
        "bias_lead",
        "rounding",
        "progress",
        "name",
        "level",
        "lasting",
        "usual",
        "where",
        "what",
        "block",
        "blocks",
        "heads",
        "total",
        "named",
        "entropy",
    }
    for row in RULES:
        assert row.severity in SEVERITIES
        fields = {name for _, name, _, _ in string.Formatter().parse(row.message + row.remedy) if name}
        assert fields <= known, row.id
        assert row.message.endswith(".")
        assert row.remedy.endswith(".")
