"""Similarity, importance and gradients, against scipy, torch and loops over tokens."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import scipy.stats
from metrics_routing import top_k_ids

from moeviz.metrics import gradients, importance, similarity

T, E, D = 40, 5, 7


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_cosines_are_those_of_every_pair(rng: np.random.Generator) -> None:
    rows_ED = rng.normal(size=(E, D))
    matrix_EE = similarity.cosines(rows_ED)
    pairs = [cosine(rows_ED[i], rows_ED[j]) for i, j in combinations(range(E), 2)]
    assert [matrix_EE[i, j] for i, j in combinations(range(E), 2)] == pytest.approx(pairs)
    summary = similarity.off_diagonal(matrix_EE)
    assert summary.mean == pytest.approx(np.mean(pairs))
    assert summary.max == pytest.approx(max(pairs))


def test_cka_ignores_rotations_and_sees_independence(rng: np.random.Generator) -> None:
    outputs_TD = rng.normal(size=(3000, D))
    turned_TD = 3 * outputs_TD @ np.linalg.qr(rng.normal(size=(D, D)))[0] + 2
    assert similarity.linear_cka(outputs_TD, turned_TD) == pytest.approx(1)
    assert similarity.linear_cka(outputs_TD, rng.normal(size=(3000, D))) < 0.02


def test_pes_is_the_mean_cosine_over_tokens_and_pairs(rng: np.random.Generator) -> None:
    outputs_TED = rng.normal(size=(T, E, D)) + 0.5
    expected = np.mean(
        [cosine(x_ED[i], x_ED[j]) for x_ED in outputs_TED for i, j in combinations(range(E), 2)]
    )
    assert similarity.pes(outputs_TED) == pytest.approx(expected)
    assert similarity.pes(np.repeat(outputs_TED[:, :1], E, axis=1)) == pytest.approx(1)


def test_representation_collapse_equals_its_definition(rng: np.random.Generator) -> None:
    hidden_TD, experts_T = rng.normal(size=(T, D)), np.arange(T) % 4
    groups = [hidden_TD[experts_T == expert] for expert in range(4)]
    within = np.mean([np.cov(group.T, bias=True) for group in groups], axis=0)
    between = np.cov(np.stack([group.mean(axis=0) for group in groups]).T, bias=True)
    found = similarity.representation_collapse(hidden_TD, experts_T)
    assert found.rc == pytest.approx(np.trace(within @ np.linalg.pinv(between)))
    assert found.ratio == pytest.approx(np.trace(within) / np.trace(between))


def test_tokens_on_their_centroids_have_collapsed(rng: np.random.Generator) -> None:
    experts_T = np.arange(T) % 4
    centres_ED = rng.normal(size=(4, D))
    tight = similarity.representation_collapse(
        centres_ED[experts_T] + 1e-4 * rng.normal(size=(T, D)), experts_T
    )
    loose = similarity.representation_collapse(centres_ED[experts_T] + rng.normal(size=(T, D)), experts_T)
    assert tight.rc < 1e-5 < loose.rc
    assert tight.ratio < 1e-5 < loose.ratio
    assert math.isinf(similarity.representation_collapse(np.ones((T, D)), experts_T).rc)


def test_coupling_is_spearmans_correlation_with_ties(rng: np.random.Generator) -> None:
    scores_TE = rng.integers(0, 6, size=(T, E))
    norms_TE = scores_TE + rng.integers(0, 4, size=(T, E))
    expected = scipy.stats.spearmanr(scores_TE.ravel(), norms_TE.ravel()).statistic
    assert similarity.coupling(scores_TE, norms_TE) == pytest.approx(expected)


# importance


def test_knockout_is_a_paired_test(rng: np.random.Generator) -> None:
    base_N = rng.normal(3, 1, size=500)
    without_N = base_N + rng.normal(0.02, 0.1, size=500)
    found = importance.knockout(base_N, without_N, "zero")
    expected = scipy.stats.ttest_rel(without_N, base_N)
    assert found.delta / found.standard_error == pytest.approx(expected.statistic)
    assert found.visible
    assert found.mode == "zero"
    assert not importance.knockout(base_N, rng.permutation(base_N), "reroute").visible


def test_padding_is_left_out_of_a_knockout() -> None:
    found = importance.knockout(np.array([1.0, 2.0, np.nan]), np.array([1.5, 2.1, 7.0]), "reroute")
    assert found.delta == pytest.approx(0.3)


def test_correlated_tokens_widen_the_error(rng: np.random.Generator) -> None:
    """Deltas shared by the 20 tokens of a sequence count as one: the standard error must cover repeated samples."""
    sequences_N = np.repeat(np.arange(50), 20)
    means, errors = [], []
    for _ in range(300):
        delta_N = rng.normal(size=50)[sequences_N]
        effect = importance.design_effect_of(delta_N, sequences_N)
        found = importance.knockout(np.zeros(1000), delta_N, "zero", effect)
        means.append(found.delta)
        errors.append(found.standard_error)
    assert np.mean(errors) == pytest.approx(1 / np.sqrt(50), rel=0.03)
    assert np.std(means) == pytest.approx(1 / np.sqrt(50), rel=0.15)
    assert importance.design_effect_of(rng.normal(size=1000), sequences_N) < 1.6


def test_reap_is_the_mean_over_routed_tokens(rng: np.random.Generator) -> None:
    ids_TK = top_k_ids(rng.normal(size=(T, E)) - np.array([0, 0, 0, 0, 99]), 2)
    weights_TK, norms_TK = rng.random((T, 2)), rng.random((T, 2))
    found_E = importance.reap(weights_TK, ids_TK, norms_TK, E)
    for expert in range(E - 1):
        mine = [
            weights_TK[token, slot] * norms_TK[token, slot]
            for token in range(T)
            for slot in range(2)
            if ids_TK[token, slot] == expert
        ]
        assert found_E[expert] == pytest.approx(np.mean(mine))
    assert math.isnan(found_E[E - 1])


# gradients


def test_clipping_and_ratios() -> None:
    assert gradients.clip_frac(np.array([0.5, 1.5, 2.0, 1.0]), 1.0) == 0.5
    np.testing.assert_allclose(gradients.grad_per_token(np.array([2.0, 0.0]), np.array([4, 0])), [0.5, 0])
    np.testing.assert_allclose(
        gradients.update_ratio(np.array([1.0, 0.0]), np.array([4.0, 0.0])), [0.25, np.nan]
    )


def test_spike_score_counts_points_far_above_their_own_past(rng: np.random.Generator) -> None:
    values = rng.normal(size=400)
    values[[150, 300]] = 12
    expected = np.mean(
        [values[i] > values[i - 100 : i].mean() + 7 * values[i - 100 : i].std() for i in range(100, 400)]
    )
    assert gradients.spike_score(values, window=100) == pytest.approx(expected)
    assert expected == pytest.approx(2 / 300)
    assert math.isnan(gradients.spike_score(values[:100], window=100))
