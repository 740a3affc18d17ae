"""Rules about loss and gradient norm on made-up series: noise is left alone, what one would see is found."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moeviz.alerts import RunPlan, ScalarDetector
from moeviz.records import AlertRecord, ScalarRecord


def feed(detector: ScalarDetector, start: int = 0, **series: np.ndarray) -> list[AlertRecord]:
    alerts = []
    for offset, values in enumerate(zip(*series.values(), strict=True)):
        named = dict(zip(series, map(float, values), strict=True))
        alerts += detector.observe(ScalarRecord(step=start + offset, rank=0, ts=0.0, values=named))
    return alerts


def noisy(level: float | np.ndarray, steps: int, seed: int = 0, share: float = 0.02) -> np.ndarray:
    return level * (1 + share * np.random.default_rng(seed).normal(size=steps))


def test_a_falling_noisy_loss_raises_nothing() -> None:
    loss = noisy(2 + 3 * np.exp(-np.arange(5000) / 800), 5000)
    assert feed(ScalarDetector(), loss=loss, grad_norm=noisy(1.0, 5000, 1, 0.1)) == []


def test_a_spike_is_raised_at_its_step_and_clears_itself() -> None:
    loss = noisy(2.0, 400)
    loss[300] = 3.0
    raised, cleared = feed(ScalarDetector(), loss=loss)
    assert (raised.rule, raised.severity, raised.raised_step) == ("LOSS_SPIKE", "warning", 300)
    assert raised.layer is None
    assert "step 300" in raised.message
    assert cleared.episode == raised.episode == "LOSS_SPIKE/run/300"
    assert cleared.cleared_step == 305


def test_a_spike_of_the_gradient_norm_counts() -> None:
    norm = noisy(1.0, 300)
    norm[200] = 4.0
    alerts = feed(ScalarDetector(), grad_norm=norm)
    assert "gradient norm" in alerts[0].message


def test_a_tiny_but_significant_rise_is_no_spike() -> None:
    loss = noisy(2.0, 300, share=1e-4)
    loss[200] = 2.0 * 1.01
    assert feed(ScalarDetector(), loss=loss) == []


def test_a_rising_loss_diverges_and_says_since_when() -> None:
    loss = np.r_[noisy(2.0, 500, 0, 0.01), noisy(2.0 * (1 + 1e-3 * np.arange(400)), 400, 1, 0.01)]
    alerts = feed(ScalarDetector(), loss=loss)
    (found,) = [alert for alert in alerts if alert.rule == "LOSS_DIVERGING" and alert.cleared_step is None][
        :1
    ]
    assert found.severity == "error"
    assert 600 < found.raised_step < 760
    assert found.evidence["since"] < 600


def test_exploding_gradients_are_found_and_clear_when_they_calm_down() -> None:
    norm = np.r_[noisy(1.0, 400, 0, 0.1), noisy(10.0, 60, 1, 0.1), noisy(1.0, 200, 2, 0.1)]
    alerts = [a for a in feed(ScalarDetector(), grad_norm=norm) if a.rule == "GRAD_EXPLOSION"]
    assert alerts[0].severity == "error"
    assert 400 < alerts[0].raised_step < 430
    assert alerts[-1].cleared_step is not None


def test_a_norm_far_above_its_clip_is_found_without_history() -> None:
    norm = noisy(15.0, 150, 0, 0.05)
    clipped = feed(ScalarDetector(plan=RunPlan(grad_clip=1.0)), grad_norm=norm)
    assert [alert.rule for alert in clipped] == ["GRAD_EXPLOSION"]
    assert "clipped" in clipped[0].message
    assert feed(ScalarDetector(), grad_norm=norm) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_critical_once(bad: float) -> None:
    detector = ScalarDetector()
    alerts = feed(detector, loss=np.array([2.0, bad, bad]), val_loss=np.array([bad, 2.0, 2.0]))
    assert [(alert.rule, alert.severity, alert.raised_step) for alert in alerts] == [
        ("NONFINITE", "critical", 1)
    ]
    assert "loss is not finite at step 1" in alerts[0].message


def test_other_scalars_pass_unseen() -> None:
    detector = ScalarDetector()
    assert feed(detector, lr=np.r_[np.ones(300), 50.0], tokens_per_second=np.full(301, math.nan)) == []
