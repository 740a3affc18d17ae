"""Rules in circulation: silent unless asked for, then as literal as they are told, and saying what they are."""

from __future__ import annotations

import numpy as np
import pytest
from metrics_routing import load_record, model

from moeviz.alerts import RULES, AlertConfig, RouterDetector, RunPlan, ScalarDetector
from moeviz.errors import MoevizError
from moeviz.records import AlertRecord, ScalarRecord

ON = AlertConfig(circulating=True)
IDS = {row.id for row in RULES if row.circulating}


def route(
    num_experts: int,
    share_E: np.ndarray,
    config: AlertConfig = ON,
    plan: RunPlan | None = None,
    lse2: float = 4.0,
) -> list[AlertRecord]:
    """120 even steps of 400 assignments, then one with these shares, then 60 even ones."""
    detector = RouterDetector(model(1, num_experts, 1), config, plan)
    alerts = []
    for step in range(181):
        counts_E = (
            np.full(num_experts, 400 // num_experts) if step != 120 else np.rint(400 * share_E).astype(int)
        )
        record = load_record(
            step,
            counts_E[None].astype(np.int64),
            1,
            token_sums={"lse_squared": np.array([lse2 * counts_E.sum()])},
        )
        alerts += [alert for alert in detector.observe(record) if alert.rule in IDS]
    return alerts


def scalars(config: AlertConfig = ON, **series: np.ndarray) -> list[AlertRecord]:
    detector, alerts = ScalarDetector(config), []
    for step, values in enumerate(zip(*series.values(), strict=True)):
        named = {name: float(v) for name, v in zip(series, values, strict=True) if not np.isnan(v)}
        alerts += detector.observe(ScalarRecord(step=step, rank=0, ts=0.0, values=named))
    return [alert for alert in alerts if alert.rule in IDS]


LOW = np.r_[0.045, 0.205, np.full(6, 0.125)]


def test_one_step_with_an_expert_under_five_percent_is_enough() -> None:
    raised, cleared = route(8, LOW)
    assert (raised.rule, raised.raised_step, raised.severity) == ("FIVE_PERCENT", 120, "warning")
    assert raised.value == pytest.approx(0.045)
    assert cleared.cleared_step is not None
    assert route(8, np.r_[0.055, 0.195, np.full(6, 0.125)]) == []


def test_five_percent_is_a_rule_about_eight_experts() -> None:
    assert route(16, np.r_[0.01, 0.115, np.full(14, 0.0625)]) == []


def test_the_weighted_z_loss_has_a_line_where_its_weight_is_known() -> None:
    even_E = np.full(8, 1 / 8)
    assert route(8, even_E, lse2=20.0) == []
    (raised,) = route(8, even_E, plan=RunPlan(z_coef=1e-3), lse2=20.0)
    assert (raised.rule, raised.value) == ("Z_LOSS_LINE", pytest.approx(0.02))
    assert route(8, even_E, plan=RunPlan(z_coef=1e-3), lse2=9.0) == []


def test_a_gradient_norm_consistently_over_ten() -> None:
    norm = np.ones(200)
    norm[60:69] = 11.0
    assert scalars(grad_norm=norm) == []
    norm[100:130] = 11.0
    raised, cleared = scalars(grad_norm=norm)
    assert (raised.rule, raised.raised_step, cleared.cleared_step) == ("GRAD_NORM_LINE", 109, 179)


def test_a_loss_without_a_new_best_for_longer_than_the_line() -> None:
    config = AlertConfig(circulating=True, circulating_loss_steps=300)
    loss = np.r_[
        np.linspace(3, 2, 100), np.full(250, 2.001), np.linspace(2, 1, 200), np.linspace(1, 1.2, 700)
    ]
    raised = [alert for alert in scalars(config, loss=loss) if alert.cleared_step is None]
    assert {alert.rule for alert in raised} == {"LOSS_RISING"}
    assert 550 + 300 < raised[0].raised_step < 550 + 300 + 150


def test_validation_far_over_training() -> None:
    loss = np.full(120, 2.0)
    validation = np.full(120, np.nan)
    validation[[0, 80, 100, 110]] = [9.0, 2.3, 2.5, 2.1]
    raised, cleared = scalars(loss=loss, val_loss=validation)
    assert (raised.rule, raised.raised_step, cleared.cleared_step) == ("VALIDATION_GAP", 100, 110)
    assert raised.value == pytest.approx(0.25)


def test_none_of_them_speaks_unless_asked() -> None:
    off = AlertConfig()
    assert route(8, LOW, off, RunPlan(z_coef=1.0)) == []
    assert (
        scalars(off, grad_norm=np.full(200, 11.0), loss=np.full(200, 2.0), val_loss=np.full(200, 9.0)) == []
    )


def test_they_say_what_they_are() -> None:
    assert len(IDS) == 5
    for row in RULES:
        assert ("circulation" in row.title + row.message) == row.circulating
        assert row.severity == "warning" or not row.circulating


def test_thresholds_are_given_by_name() -> None:
    config = AlertConfig().with_thresholds(["starved_cap=0.3", "raise-after=5", "swing_autocorr=-0.5"])
    assert config == AlertConfig(starved_cap=0.3, raise_after=5, swing_autocorr=-0.5)
    assert isinstance(config.raise_after, int)
    for setting, message in (
        ("starved_cup=0.3", "starved_cap"),
        ("starved_cap=low", "a number"),
        ("raise_after=2.5", "a whole number"),
        ("raise_after=0", "at least 1"),
        ("dead_line=-1", "negative"),
        ("circulating=1", "no threshold"),
        ("__class__=1", "no threshold"),
    ):
        with pytest.raises(MoevizError, match=message):
            AlertConfig().with_thresholds([setting])
