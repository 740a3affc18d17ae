"""Laws of the load metrics, against loops, scipy and the counts of two published models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from metrics_routing import count_by_loop, published_counts, top_k_ids

from moeviz.metrics import load

E, K, T = 8, 2, 60
SCALARS = {
    "load_entropy": lambda s, width: load.load_entropy(s, width),
    "n_eff": lambda s, width: load.n_eff(s),
    "n_eff2": lambda s, width: load.n_eff2(s),
    "eff_util": lambda s, width: load.eff_util(s, K, width),
    "excess_cov": lambda s, width: load.excess_cov(s, K, width),
    "load_cv": lambda s, width: load.load_cv(s, width),
    "maxvio": lambda s, width: load.maxvio(s, width),
    "load_imbalance": lambda s, width: load.load_imbalance(s, width),
    "min_load": lambda s, width: load.min_load(s, width),
    "gini": lambda s, width: load.gini(s, width),
}


@pytest.fixture
def counts_LE() -> np.ndarray:
    rng = np.random.default_rng(0)
    logits_LTE = rng.normal(size=(3, T, E)) + rng.normal(size=(3, 1, E))
    return np.stack([count_by_loop(top_k_ids(logits_TE, K), E) for logits_TE in logits_LTE])


def test_shares_sum_to_one_and_coverage_to_k(counts_LE: np.ndarray) -> None:
    share_LE = load.load_share(counts_LE)
    np.testing.assert_allclose(share_LE.sum(axis=-1), 1)
    np.testing.assert_allclose(load.coverage(share_LE, K).sum(axis=-1), K)
    np.testing.assert_allclose(load.coverage(share_LE, K), counts_LE / T)
    np.testing.assert_allclose(load.load_rel(share_LE).mean(axis=-1), 1)


def test_each_metric_equals_its_plain_definition(counts_LE: np.ndarray) -> None:
    for counts_E in counts_LE:
        share_E = counts_E / counts_E.sum()
        rel = [E * float(s) for s in share_E]
        entropy = scipy.stats.entropy(share_E)
        assert load.entropy_nats(share_E) == pytest.approx(entropy)
        assert load.load_entropy(share_E) == pytest.approx(entropy / math.log(E))
        assert load.n_eff(share_E) == pytest.approx(math.exp(entropy))
        assert load.load_cv(share_E) == pytest.approx(np.std(rel))
        assert load.n_eff2(share_E) == pytest.approx(E / (1 + np.var(rel)))
        assert load.maxvio(share_E) == pytest.approx(max(rel) - 1)
        assert load.min_load(share_E) == pytest.approx(min(rel))
        pairs = sum(abs(a - b) for a in rel for b in rel)
        assert load.gini(share_E) == pytest.approx(pairs / (2 * E * E))
        assert load.excess_cov(share_E, K) == pytest.approx((max(rel) - 1) / (E / K - 1))
        assert load.eff_util(share_E, K) == pytest.approx((math.exp(entropy) - K) / (E - K))
        assert load.load_chi2(counts_E) == pytest.approx(scipy.stats.chisquare(counts_E).statistic)


def test_even_routing_reads_as_even() -> None:
    share_E = load.load_share(np.full(E, 30))
    values = [load.load_cv(share_E), load.maxvio(share_E), load.gini(share_E)]
    np.testing.assert_allclose(values, 0, atol=1e-7)
    assert load.eff_util(share_E, K) == pytest.approx(1)
    assert load.excess_cov(share_E, K) == pytest.approx(0)


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 1), (8, 2), (64, 8)])
def test_total_collapse_reaches_the_end_of_every_scale(num_experts: int, top_k: int) -> None:
    share_E = load.load_share(np.r_[np.full(top_k, 100), np.zeros(num_experts - top_k)])
    assert load.maxvio(share_E) == pytest.approx(num_experts / top_k - 1)
    assert load.load_cv(share_E) == pytest.approx(math.sqrt(num_experts / top_k - 1))
    assert load.n_eff(share_E) == pytest.approx(top_k)
    assert load.eff_util(share_E, top_k) == pytest.approx(0)
    assert load.excess_cov(share_E, top_k) == pytest.approx(1)
    assert load.gini(share_E) == pytest.approx(1 - top_k / num_experts)
    assert load.min_load(share_E) == 0


@pytest.mark.parametrize("name", SCALARS)
def test_scalars_do_not_depend_on_the_order_of_experts(name: str, counts_LE: np.ndarray) -> None:
    share_LE = load.load_share(counts_LE)
    order_E = np.random.default_rng(1).permutation(E)
    np.testing.assert_allclose(SCALARS[name](share_LE[:, order_E], E), SCALARS[name](share_LE, E))


@pytest.mark.parametrize("name", SCALARS)
def test_padding_columns_change_nothing(name: str, counts_LE: np.ndarray) -> None:
    padded_LE = np.pad(counts_LE, [(0, 0), (0, 5)])
    widths_L = np.full(len(counts_LE), E)
    expected_L = SCALARS[name](load.load_share(counts_LE), None)
    np.testing.assert_allclose(SCALARS[name](load.load_share(padded_LE), widths_L), expected_L)


def test_layers_of_different_width_share_an_array() -> None:
    narrow, wide = np.array([5, 1, 6, 4]), np.array([3, 0, 9, 1, 1, 2])
    both_LE = np.stack([np.pad(narrow, (0, 2)), wide])
    for name, metric in SCALARS.items():
        alone = [metric(load.load_share(row), None) for row in (narrow, wide)]
        np.testing.assert_allclose(metric(load.load_share(both_LE), np.array([4, 6])), alone, err_msg=name)


def test_micro_batches_add_up() -> None:
    rng = np.random.default_rng(2)
    ids_TK = top_k_ids(rng.normal(size=(T, E)), K)
    halves = count_by_loop(ids_TK[:17], E) + count_by_loop(ids_TK[17:], E)
    np.testing.assert_array_equal(halves, count_by_loop(ids_TK, E))


def test_a_layer_without_tokens_is_nan_and_harms_no_other() -> None:
    counts_LE = np.array([[0, 0, 0, 0], [1, 2, 3, 4]])
    share_LE = load.load_share(counts_LE)
    for name, metric in SCALARS.items():
        values_L = metric(share_LE, np.array([4, 4]))
        assert np.isnan(values_L[0]), name
        assert np.isfinite(values_L[1]), name


def test_a_layer_that_uses_all_its_experts_has_no_utilisation() -> None:
    share_E = load.load_share(np.array([4, 4]))
    assert np.isnan(load.eff_util(share_E, 2))
    assert np.isnan(load.excess_cov(share_E, 2))


def test_the_starved_line_is_five_percent_at_eight_experts() -> None:
    assert load.starved_line(8) / 8 == pytest.approx(0.05)
    np.testing.assert_allclose(load.starved_line(np.array([16, 64, 256])), [0.30, 0.15, 0.075])


def test_experts_below_ignores_padding() -> None:
    rel_LE = np.array([[0.1, 2.9, 0.0], [0.1, 0.2, 2.7]])
    np.testing.assert_array_equal(load.experts_below(rel_LE, 0.15, np.array([2, 3])), [1, 1])


@pytest.mark.parametrize(
    ("model_name", "top_k", "domain", "expected"),
    [
        (
            "olmoe",
            8,
            "c4",
            {
                "load_cv": (0.32, 0.40, 0.51),
                "maxvio": (2.02, 1.66, 1.50),
                "min_load": (0.30, 0.20, 0.19),
                "n_eff": (61.3, 59.3, 56.1),
                "eff_util": (0.95, 0.92, 0.86),
                "excess_cov": (0.29, 0.24, 0.21),
                "gini": (0.14, 0.21, 0.29),
            },
        ),
        (
            "olmoe",
            8,
            "arxiv",
            {
                "load_cv": (0.95, 1.28, 1.25),
                "maxvio": (6.81, 5.28, 6.50),
                "min_load": (0.21, 0.05, 0.001),
                "n_eff": (50.4, 36.7, 36.3),
                "eff_util": (0.76, 0.51, 0.51),
                "excess_cov": (0.97, 0.75, 0.93),
                "gini": (0.32, 0.55, 0.56),
            },
        ),
        (
            "mistral",
            2,
            "c4",
            {
                "load_cv": (0.10, 0.04, 0.16),
                "maxvio": (0.12, 0.08, 0.12),
                "min_load": (0.82, 0.95, 0.62),
                "n_eff": (7.96, 7.99, 7.89),
                "excess_cov": (0.04, 0.03, 0.04),
                "gini": (0.05, 0.02, 0.07),
            },
        ),
        (
            "mistral",
            2,
            "book",
            {
                "load_cv": (0.13, 0.08, 0.25),
                "maxvio": (0.18, 0.09, 0.29),
                "min_load": (0.74, 0.84, 0.40),
                "n_eff": (7.93, 7.97, 7.71),
                "excess_cov": (0.06, 0.03, 0.10),
                "gini": (0.07, 0.04, 0.12),
            },
        ),
    ],
)
def test_published_models_read_as_documented(
    model_name: str, top_k: int, domain: str, expected: dict[str, tuple[float, ...]]
) -> None:
    share_LE = load.load_share(published_counts(model_name, domain))
    metrics = dict(SCALARS)
    metrics["eff_util"] = lambda s, _: load.eff_util(s, top_k)
    metrics["excess_cov"] = lambda s, _: load.excess_cov(s, top_k)
    for name, values in expected.items():
        # The documented values are rounded to the digits shown; half a unit of the last one is the tolerance.
        digits = max(len(str(value).partition(".")[2]) for value in values)
        np.testing.assert_allclose(
            metrics[name](share_LE, None), values, atol=0.51 * 10**-digits, err_msg=name
        )
