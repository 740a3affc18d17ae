"""The learning rate depends on tokens alone, and hits the values that its name promises."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from trainer.config import OptimConfig, ScheduleConfig, TrainConfig
from trainer.schedule import LearningRate, learning_rate_of

PEAK, WARMUP, TOTAL = 2.0, 300, 1300


def rate(shape: str, **changes: float) -> LearningRate:
    values = {
        "peak": PEAK,
        "warmup_tokens": WARMUP,
        "total_tokens": TOTAL,
        "min_ratio": 0.1,
        "decay_share": 0.25,
    }
    return LearningRate(shape=shape, **(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_a_straight_line_to_the_peak(shape: str) -> None:
    for tokens in (1, 150, 299):
        assert rate(shape)(tokens) == pytest.approx(PEAK * tokens / WARMUP)
    assert rate(shape)(WARMUP) == PEAK


@pytest.mark.parametrize(
    ("shape", "half", "end"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1, 1)]
)
def test_half_way_and_end(shape: str, half: float, end: float) -> None:
    assert rate(shape)(800) == pytest.approx(PEAK * half)
    assert rate(shape)(TOTAL) == pytest.approx(PEAK * end)
    assert rate(shape)(10 * TOTAL) == pytest.approx(PEAK * end), "past its end a schedule stays where it is"


def test_cosine_at_a_quarter_is_the_formula() -> None:
    expected = PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate("cosine")(WARMUP + 250) == pytest.approx(expected)


def test_wsd_is_flat_until_its_last_share_and_then_straight() -> None:
    assert {rate("wsd")(tokens) for tokens in (300, 700, 1050)} == {PEAK}
    assert rate("wsd")(1175) == pytest.approx(PEAK * 0.55)
    assert rate("wsd")(1300) == pytest.approx(PEAK * 0.1)
    assert rate("wsd", decay_share=0.0)(1300) == PEAK


def test_the_rate_falls_monotonically_after_the_warm_up() -> None:
    for shape in ("cosine", "linear", "wsd"):
        rates = [rate(shape)(tokens) for tokens in range(WARMUP, TOTAL + 1, 10)]
        assert all(later <= earlier for earlier, later in pairwise(rates))


def test_no_warm_up_starts_at_the_peak_and_a_warm_up_longer_than_the_run_never_divides_by_zero() -> None:
    assert rate("linear", warmup_tokens=0)(0) == PEAK
    assert rate("cosine", warmup_tokens=2000)(1300) == pytest.approx(PEAK * 0.65)


def test_doubling_the_batch_and_halving_the_steps_leaves_the_curve_over_tokens() -> None:
    optim = OptimConfig(learning_rate=PEAK)
    small = TrainConfig(optim=optim, max_steps=40, schedule=ScheduleConfig(warmup_steps=10))
    large = TrainConfig(optim=optim, max_steps=20, schedule=ScheduleConfig(warmup_steps=5))
    one, two = learning_rate_of(small, tokens_per_step=64), learning_rate_of(large, tokens_per_step=128)
    assert [one(tokens) for tokens in range(0, 2561, 64)] == [two(tokens) for tokens in range(0, 2561, 64)]


def test_lr_steps_sets_the_length_apart_from_max_steps() -> None:
    config = TrainConfig(max_steps=10, schedule=ScheduleConfig(lr_steps=40, warmup_steps=0))
    assert learning_rate_of(config, 1) == learning_rate_of(replace(config, max_steps=40), 1)
