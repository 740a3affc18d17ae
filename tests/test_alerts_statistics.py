"""Smoothed loads: several records at once leave what one by one leave, also where layers have nothing to say."""

from __future__ import annotations

import numpy as np
import pytest

from moeviz.alerts import AlertConfig
from moeviz.alerts.statistics import LoadStatistics

WIDTHS_L, TOP_K_L = np.array([8, 5, 1]), np.array([2, 2, 1])
KNOWN = (
    "seen_L", "assignments_L", "even_total_L", "mean_LE", "window_L", "swing_L", "swing_noise_L", "autocorr_L",
    "design_effect_L", "smooth_share_LE",
)  # fmt: skip


def statistics() -> LoadStatistics:
    return LoadStatistics(WIDTHS_L, TOP_K_L, AlertConfig())


def counts(records: int, missing: float) -> np.ndarray:
    """Loads that swing and jump, of layers of different width, of which a share is missing."""
    rng = np.random.default_rng(5)
    counts_TLE = np.zeros((records, len(WIDTHS_L), WIDTHS_L.max()), dtype=np.int64)
    for t in range(records):
        for layer, (width, top_k) in enumerate(zip(WIDTHS_L, TOP_K_L, strict=True)):
            scale = 3.0 if rng.random() < 0.05 else 0.3
            share_E = np.exp(scale * rng.normal(size=width) + 0.4 * (-1) ** (t + np.arange(width)))
            if rng.random() >= missing:
                tokens = int(rng.choice([40, 400]))
                counts_TLE[t, layer, :width] = rng.multinomial(tokens * top_k, share_E / share_E.sum())
    return counts_TLE


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("together", [2, 7, 150])
def test_records_at_once_leave_what_one_by_one_leave(together: int, missing: float) -> None:
    counts_TLE, alone, blocks = counts(150, missing), statistics(), statistics()
    singles = [alone.follow(counts_LE[None]).at(0) for counts_LE in counts_TLE]
    for start in range(0, len(counts_TLE), together):
        block_TLE = counts_TLE[start : start + together]
        course = blocks.follow(block_TLE)
        for t in range(len(block_TLE)):
            then, single = course.at(t), singles[start + t]
            for name in KNOWN:
                if name != "window_L":
                    np.testing.assert_array_equal(getattr(then, name), getattr(single, name), err_msg=name)
    for name in KNOWN:
        np.testing.assert_array_equal(getattr(blocks, name), getattr(alone, name), err_msg=name)
    assert alone.design_effect_L[:2].min() > 1, "the noise is estimated, not left at its floor"


def test_a_layer_without_assignments_keeps_its_state() -> None:
    seen, gap = statistics(), statistics()
    counts_TLE = counts(60, 0.0)
    seen.follow(counts_TLE)
    gap.follow(np.concatenate([counts_TLE, np.zeros_like(counts_TLE[:5])]))
    assert (gap.assignments_L == 0).all()
    for name in ("seen_L", "even_total_L", "mean_LE", "swing_L", "autocorr_L", "design_effect_L", "window_L"):
        np.testing.assert_array_equal(getattr(gap, name), getattr(seen, name), err_msg=name)


def test_means_and_medians_are_those_of_the_experts_alone() -> None:
    """A layer of five among layers of eight reads as the same layer by itself."""
    counts_TLE, padded = counts(90, 0.1), statistics()
    alone = LoadStatistics(WIDTHS_L[1:2], TOP_K_L[1:2], AlertConfig())
    padded.follow(counts_TLE)
    alone.follow(counts_TLE[:, 1:2, :5])
    np.testing.assert_array_equal(padded.mean_LE[1, :5], alone.mean_LE[0])
    for name in ("design_effect_L", "swing_L", "swing_noise_L", "autocorr_L"):
        np.testing.assert_allclose(
            getattr(padded, name)[1], getattr(alone, name)[0], rtol=1e-12, err_msg=name
        )
