"""The noise floors, against routing drawn token by token and against the values in their documentation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from metrics_routing import top_k_ids

from moeviz.metrics import capacity, load, noise


def draw_even_routing(
    rng: np.random.Generator, steps: int, tokens: int, num_experts: int, top_k: int
) -> np.ndarray:
    """Counts of independent tokens that each choose k experts at random. int64 [steps, E]."""
    ids_NTK = top_k_ids(rng.random((steps, tokens, num_experts)), top_k)
    return np.stack([np.bincount(ids_TK.ravel(), minlength=num_experts) for ids_TK in ids_NTK])


@pytest.fixture(scope="module")
def drawn_NE() -> np.ndarray:
    return draw_even_routing(np.random.default_rng(0), 1500, 256, 16, 4)


def test_spread_of_the_load_matches_drawn_routing(drawn_NE: np.ndarray) -> None:
    rel_NE = load.load_rel(load.load_share(drawn_NE))
    assert rel_NE.std() == pytest.approx(noise.even_load_sd(256, 4, 16), rel=0.02)


def test_floors_match_drawn_routing(drawn_NE: np.ndarray) -> None:
    share_NE = load.load_share(drawn_NE)
    shape = (256, 4, 16)
    assert load.load_cv2(share_NE).mean() == pytest.approx(noise.cv2_floor(*shape), rel=0.03)
    assert load.maxvio(share_NE).mean() == pytest.approx(noise.maxvio_floor(*shape), rel=0.08)
    assert load.gini(share_NE).mean() == pytest.approx(noise.gini_floor(*shape), rel=0.05)
    gap = np.log(16) - load.entropy_nats(share_NE).mean()
    assert gap == pytest.approx(noise.entropy_gap_floor(*shape), rel=0.05)


def test_chi_square_follows_its_distribution_after_the_documented_scaling(drawn_NE: np.ndarray) -> None:
    scaled_N = load.load_chi2(drawn_NE) * (16 - 1) / (16 - 4)
    assert load.load_chi2(drawn_NE).mean() == pytest.approx(16 - 4, rel=0.03)
    assert scipy.stats.kstest(scaled_N, scipy.stats.chi2(15).cdf).pvalue > 0.01


def test_tokens_that_come_in_clusters_have_that_design_effect() -> None:
    rng = np.random.default_rng(1)
    clusters_NE = draw_even_routing(rng, 1500, 64, 16, 4)
    rel_NE = load.load_rel(load.load_share(4 * clusters_NE))
    assert rel_NE.std() == pytest.approx(noise.even_load_sd(256, 4, 16, design_effect=4.0), rel=0.02)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "tokens", "sd", "floor", "floor_at_ten"),
    [
        (8, 2, 1024, 0.054, 0.08, 0.24),
        (8, 2, 2048, 0.038, 0.06, 0.17),
        (64, 8, 1024, 0.083, 0.20, 0.61),
        (64, 8, 8192, 0.029, 0.07, 0.22),
    ],
)
def test_documented_floors(
    num_experts: int, top_k: int, tokens: int, sd: float, floor: float, floor_at_ten: float
) -> None:
    assert noise.even_load_sd(tokens, top_k, num_experts) == pytest.approx(sd, abs=6e-4)
    assert noise.maxvio_floor(tokens, top_k, num_experts) == pytest.approx(floor, abs=8e-3)
    assert noise.maxvio_floor(tokens, top_k, num_experts, 10.0) == pytest.approx(floor_at_ten, abs=1.5e-2)


def test_excess_variation_does_not_depend_on_the_batch_size() -> None:
    rng = np.random.default_rng(3)
    share_E = np.array([0.3, 0.2, 0.2, 0.1, 0.1, 0.1])
    truth = load.load_cv2(share_E)
    means = {}
    for tokens in (100, 10_000):
        cv2_N = load.load_cv2(load.load_share(rng.multinomial(tokens, share_E, size=4000)))
        means[tokens] = cv2_N.mean(), noise.cv2_excess(cv2_N, tokens, 1, 6).mean()
    assert means[100][0] > truth + 0.04
    assert abs(means[100][1] - truth) < 0.01
    assert abs(means[10_000][1] - truth) < 0.002


def test_expected_drop_matches_a_simulated_limit_and_the_documented_values() -> None:
    rng = np.random.default_rng(4)
    counts_NE = draw_even_routing(rng, 300, 2048, 8, 2)
    for factor in (1.0, 1.05):
        slots = capacity.capacity(2048, 2, 8, factor)
        dropped_NE = np.maximum(counts_NE - slots, 0)
        measured = capacity.drop_rate(dropped_NE, counts_NE).mean()
        assert capacity.expected_drop(factor, 2048, 2, 8) == pytest.approx(measured, abs=5e-4)
    assert capacity.expected_drop(1.0, 2048, 2, 8) == pytest.approx(0.015, abs=5e-4)
    assert capacity.expected_drop(1.05, 2048, 2, 8) == pytest.approx(0.0017, abs=2e-4)
    assert capacity.expected_drop(1.25, 2048, 2, 8) < 1e-6


def test_the_capacity_factor_can_be_read_off_the_drops() -> None:
    counts_E = np.array([700, 100, 120, 80])
    slots = capacity.capacity(500, 2, 4, 1.2)
    dropped_E = np.maximum(counts_E - slots, 0)
    assert capacity.implied_capacity_factor(counts_E, dropped_E, 4) == pytest.approx(1.2)
    assert np.isnan(capacity.implied_capacity_factor(counts_E, np.zeros(4), 4))
    assert capacity.overflow(counts_E, slots).max() == pytest.approx(700 / slots - 1)


def test_a_token_is_dropped_when_it_loses_all_experts() -> None:
    kept_TK = np.array([[1, 1], [0, 1], [0, 0], [1, 0]], dtype=bool)
    assert capacity.token_drop(kept_TK) == 0.25
