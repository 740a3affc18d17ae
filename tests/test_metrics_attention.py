"""Attention and latent metrics on maps whose answer is known, and against torch and loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats

from moeviz.metrics import attention, latent

H, S = 3, 9


def causal_maps(rng: np.random.Generator) -> np.ndarray:
    """float64 [H, S, S], rows sum to 1."""
    scores_HSS = np.where(np.tril(np.ones((S, S))) > 0, rng.normal(size=(H, S, S)), -np.inf)
    return scipy.special.softmax(scores_HSS, axis=-1)


UNIFORM_SS = np.tril(np.ones((S, S))) / np.arange(1, S + 1)[:, None]
PREVIOUS_SS = np.eye(S, k=-1) + np.eye(S) * (np.arange(S) == 0)
FIRST_SS = np.eye(S)[np.zeros(S, dtype=int)]


def test_entropy_spans_zero_to_one() -> None:
    np.testing.assert_allclose(
        attention.attn_entropy(np.stack([UNIFORM_SS, PREVIOUS_SS, FIRST_SS])), [1, 0, 0], atol=1e-12
    )


def test_entropy_is_the_mean_normalised_entropy_of_rows() -> None:
    maps_HSS = causal_maps(np.random.default_rng(0))
    expected = [
        np.mean([scipy.stats.entropy(map_SS[t, : t + 1]) / math.log(t + 1) for t in range(1, S)])
        for map_SS in maps_HSS
    ]
    np.testing.assert_allclose(attention.attn_entropy(maps_HSS), expected)


def test_sinks_and_previous_token_heads_are_recognised() -> None:
    maps_HSS = np.stack([UNIFORM_SS, PREVIOUS_SS, FIRST_SS])
    expected_uniform = np.mean(1 / np.arange(1, S + 1))
    np.testing.assert_allclose(attention.sink_mass(maps_HSS), [expected_uniform, 2 / S, 1])
    assert attention.sink_rate(maps_HSS[None]) == pytest.approx(2 / 3)
    assert attention.sink_rate(maps_HSS[None], threshold=0.5) == pytest.approx(1 / 3)
    np.testing.assert_allclose(attention.prev_token(maps_HSS)[1:], [(S - 1) / S, 1 / S])


def test_the_sink_of_a_later_key_counts_the_queries_that_see_it() -> None:
    assert attention.sink_mass(UNIFORM_SS, key=4) == pytest.approx(np.mean(1 / np.arange(5, S + 1)))


def test_patterns_of_repeated_tokens_equal_loops() -> None:
    token_ids_S = np.array([4, 2, 7, 4, 2, 7, 4])
    duplicate, induction = np.zeros((7, 7)), np.zeros((7, 7))
    for query in range(7):
        for key in range(query):
            duplicate[query, key] = token_ids_S[key] == token_ids_S[query]
        for key in range(1, query + 1):
            induction[query, key] = key - 1 < query and token_ids_S[key - 1] == token_ids_S[query]
    np.testing.assert_array_equal(attention.duplicate_pattern(token_ids_S), duplicate)
    np.testing.assert_array_equal(attention.induction_pattern(token_ids_S), induction)


def test_an_induction_head_scores_one_on_the_second_copy() -> None:
    half = np.random.default_rng(1).permutation(50)[:8]
    token_ids_S = np.r_[half, half]
    map_SS = np.zeros((16, 16))
    map_SS[np.arange(8, 16), np.arange(1, 9)] = 1
    assert attention.pattern_share(map_SS, attention.induction_pattern(token_ids_S)) == 1
    assert attention.pattern_share(map_SS, attention.duplicate_pattern(token_ids_S)) == 0


def test_redundancy_is_one_for_equal_heads_and_zero_for_disjoint_ones() -> None:
    assert attention.head_redundancy(np.stack([UNIFORM_SS] * 3)) == pytest.approx(1)
    apart = np.stack([np.eye(S), np.roll(np.eye(S), 1, axis=1)])
    assert attention.head_redundancy(apart) == pytest.approx(0)


def test_distance_counts_tokens_back() -> None:
    assert attention.attn_distance(PREVIOUS_SS) == pytest.approx((S - 1) / S)
    assert attention.attn_distance(FIRST_SS) == pytest.approx((S - 1) / 2)


# latent space


def test_isotropic_latents_use_every_dimension() -> None:
    latents_NC = np.random.default_rng(2).normal(size=(4000, 6))
    assert latent.participation_ratio(latents_NC) == pytest.approx(6, rel=0.02)
    assert latent.latent_erank(latents_NC) == pytest.approx(6, rel=0.02)
    assert latent.latent_util(latents_NC) == pytest.approx(1, rel=0.02)
    assert latent.dims_for_variance(latents_NC) == 6
    assert latent.latent_dead(latents_NC) == 0


def test_latents_on_a_line_use_one_dimension_wherever_it_points() -> None:
    rng = np.random.default_rng(3)
    latents_NC = rng.normal(size=(500, 1)) * rng.normal(size=6) + rng.normal(size=6)
    assert latent.participation_ratio(latents_NC) == pytest.approx(1)
    assert latent.latent_erank(latents_NC) == pytest.approx(1)
    assert latent.dims_for_variance(latents_NC) == 1


def test_participation_ratio_is_that_of_the_covariance() -> None:
    latents_NC = np.random.default_rng(4).normal(size=(300, 5)) * np.array([5, 3, 1, 1, 0.1])
    values = np.linalg.eigvalsh(np.cov(latents_NC.T))
    assert latent.participation_ratio(latents_NC) == pytest.approx(values.sum() ** 2 / (values**2).sum())
    ordered = np.sort(values)[::-1]
    needed = next(n for n in range(1, 6) if ordered[:n].sum() >= 0.9 * ordered.sum())
    assert latent.dims_for_variance(latents_NC) == needed


def test_effective_rank_of_known_spectra() -> None:
    assert latent.effective_rank(np.diag([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    p = np.array([3, 1]) / 4
    assert latent.effective_rank(np.diag([3.0, 1.0])) == pytest.approx(math.exp(-(p * np.log(p)).sum()))


def test_a_constant_dimension_is_dead() -> None:
    latents_NC = np.random.default_rng(5).normal(size=(300, 5))
    latents_NC[:, 2] = 7 + 1e-4 * latents_NC[:, 2]
    assert latent.latent_dead(latents_NC) == 1


def test_slots_mirror_experts() -> None:
    write_SM = np.zeros((10, 4))
    write_SM[:, 0], write_SM[:, 1] = 0.75, 0.25
    np.testing.assert_allclose(latent.slot_mass(write_SM), [0.75, 0.25, 0, 0])
    assert latent.slot_dead(write_SM) == 2
    assert latent.slot_n_eff(write_SM) == pytest.approx(math.exp(scipy.stats.entropy([0.75, 0.25])))
    assert latent.slot_n_eff(np.full((10, 4), 0.25)) == pytest.approx(4)
    assert latent.write_entropy(np.full((10, 4), 0.25)) == pytest.approx(1)
    assert latent.read_entropy(np.eye(4, 10)) == pytest.approx(0)
    assert latent.read_entropy(np.full((4, 10), 0.1)) == pytest.approx(1)


def test_copied_slots_overlap_and_lower_the_rank_of_the_map() -> None:
    rng = np.random.default_rng(6)
    read_MS = scipy.special.softmax(3 * rng.normal(size=(3, 12)), axis=-1)
    write_SM = scipy.special.softmax(3 * rng.normal(size=(12, 3)), axis=-1)
    pairs = [
        read_MS[i] @ read_MS[j] / np.linalg.norm(read_MS[i]) / np.linalg.norm(read_MS[j])
        for i, j in [(0, 1), (0, 2), (1, 2)]
    ]
    assert latent.slot_overlap(read_MS) == pytest.approx(np.mean(pairs))
    assert latent.effective_map_rank(write_SM, read_MS) <= 3
    copied_MS = np.repeat(read_MS[:1], 3, axis=0)
    assert latent.slot_overlap(copied_MS) == pytest.approx(1)
    assert latent.effective_map_rank(write_SM, copied_MS) == pytest.approx(1)


def test_looking_ahead_is_found() -> None:
    read_MS = np.tril(np.ones((3, 3))) / np.arange(1, 4)[:, None]
    assert latent.future_leak(np.eye(3), read_MS) == 0
    assert latent.future_leak(np.eye(3), read_MS[::-1]) == pytest.approx(1 / 3)
