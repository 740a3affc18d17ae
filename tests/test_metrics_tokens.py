"""Co-activation, specialisation, change over training and paths: laws, loops over tokens, published maxima."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
from metrics_routing import published_counts, published_folder, top_k_ids

from moeviz.metrics import change, coactivation, paths, specialization

T, E, K = 400, 9, 3


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def ids_TK(rng: np.random.Generator) -> np.ndarray:
    return top_k_ids(rng.normal(size=(T, E)) + rng.normal(size=E), K)


# change over training


def test_a_checkpoint_is_saturated_with_itself(ids_TK: np.ndarray) -> None:
    assert change.saturation(ids_TK, ids_TK) == 1
    assert change.saturation(ids_TK, ids_TK[:, ::-1]) == 1
    assert change.churn(ids_TK, ids_TK) == 0
    assert change.flip1(ids_TK, ids_TK) == 0


def test_saturation_is_the_mean_overlap_of_sets(rng: np.random.Generator, ids_TK: np.ndarray) -> None:
    other_TK = top_k_ids(rng.normal(size=(T, E)), K)
    overlaps = [len(set(a) & set(b)) / K for a, b in zip(ids_TK.tolist(), other_TK.tolist(), strict=True)]
    assert change.saturation(ids_TK, other_TK) == pytest.approx(np.mean(overlaps))
    np.testing.assert_allclose(change.overlap(ids_TK, other_TK), overlaps)
    flips = np.mean([a[0] != b[0] for a, b in zip(ids_TK.tolist(), other_TK.tolist(), strict=True)])
    assert change.flip1(ids_TK, other_TK) == pytest.approx(flips)


def test_random_routing_is_saturated_by_chance_only(rng: np.random.Generator) -> None:
    first, second = (top_k_ids(rng.normal(size=(20_000, E)), K) for _ in range(2))
    assert change.saturation(first, second) == pytest.approx(K / E, abs=0.01)
    assert change.saturation_adj(change.saturation(first, second), K, E) == pytest.approx(0, abs=0.015)
    assert change.saturation_adj(1.0, K, E) == 1


def test_layers_are_kept_apart(rng: np.random.Generator, ids_TK: np.ndarray) -> None:
    other_TK = top_k_ids(rng.normal(size=(T, E)), K)
    both = change.saturation(np.stack([ids_TK, ids_TK]), np.stack([ids_TK, other_TK]))
    np.testing.assert_allclose(both, [1, change.saturation(ids_TK, other_TK)])


def test_last_fluctuation_is_the_last_step_that_differs() -> None:
    first_ids_CT = np.array([[0, 1, 5, 2], [0, 2, 5, 3], [0, 1, 5, 3], [0, 2, 5, 2]])
    last_T = change.last_fluctuation(first_ids_CT, np.array([10, 20, 30, 40]))
    assert last_T.tolist() == [-1, 30, -1, 30]
    np.testing.assert_allclose(change.still_moving(last_T, np.array([0, 30, 31])), [0.5, 0.5, 0])


def test_jensen_shannon_is_scipys_squared(rng: np.random.Generator) -> None:
    p_TE, q_TE = (scipy.special.softmax(rng.normal(size=(5, E)), axis=-1) for _ in range(2))
    expected = scipy.spatial.distance.jensenshannon(p_TE, q_TE, axis=1) ** 2
    np.testing.assert_allclose(change.jensen_shannon(p_TE, q_TE), expected)
    assert change.probe_drift(p_TE, q_TE) == pytest.approx(expected.mean())
    assert change.jensen_shannon(np.eye(2)[0], np.eye(2)[1]) == pytest.approx(math.log(2))


# co-activation


def test_coactivation_counts_every_pair_of_every_token(ids_TK: np.ndarray) -> None:
    counts_EE = coactivation.coactivation_counts(ids_TK, E)
    expected = Counter(frozenset(pair) for token in ids_TK.tolist() for pair in combinations(token, 2))
    for i, j in combinations(range(E), 2):
        assert counts_EE[i, j] == counts_EE[j, i] == expected[frozenset((i, j))]
    np.testing.assert_array_equal(np.diag(counts_EE), np.bincount(ids_TK.ravel(), minlength=E))


def test_rows_of_coactivation_sum_to_k_minus_one(ids_TK: np.ndarray) -> None:
    share_EE = coactivation.coactivation(coactivation.coactivation_counts(ids_TK, E))
    np.testing.assert_allclose(np.nansum(share_EE, axis=1), K - 1)
    assert np.isnan(np.diag(share_EE)).all()


def test_random_routing_has_the_documented_nulls(rng: np.random.Generator) -> None:
    ids_TK = top_k_ids(rng.random((20_000, 16)), 4)
    for compat in ("paper", "olmoe_script"):
        share_EE = coactivation.coactivation(coactivation.coactivation_counts(ids_TK, 16, compat))
        assert np.nanmean(share_EE) == pytest.approx(coactivation.coactivation_null(4, 16, compat), rel=0.01)
    assert coactivation.coactivation_null(8, 64) == pytest.approx(0.111, abs=5e-4)
    assert coactivation.coactivation_null(8, 64, "olmoe_script") == pytest.approx(0.028, abs=5e-4)


def test_the_released_script_misses_pairs_that_are_not_adjacent_in_rank() -> None:
    """Experts 0 and 3 are always active together, at ranks 1 and 4: 1 by the formula, 0 by the script."""
    ids_TK = np.array([[0, 1, 2, 3], [0, 4, 5, 3], [0, 1, 5, 3]])
    paper = coactivation.coactivation(coactivation.coactivation_counts(ids_TK, 6))
    script = coactivation.coactivation(coactivation.coactivation_counts(ids_TK, 6, "olmoe_script"))
    assert paper[0, 3] == 1
    assert script[0, 3] == 0
    assert coactivation.coactivation_norm(paper, 4)[0, 3] == 1


def test_lift_is_one_for_independent_experts_whatever_their_load(rng: np.random.Generator) -> None:
    """A pair of busy experts meets often without preferring each other: the lift says so."""
    busy_TE = rng.random((40_000, 6)) < np.array([0.7, 0.5, 0.3, 0.2, 0.2, 0.1])
    counts_EE = busy_TE.astype(float).T @ busy_TE
    lift_EE = coactivation.coactivation_lift(counts_EE, 40_000)
    np.testing.assert_allclose(lift_EE[~np.eye(6, dtype=bool)], 1, atol=0.08)
    together = np.array([[0, 1]] * 50 + [[2, 3]] * 50)
    lift_EE = coactivation.coactivation_lift(coactivation.coactivation_counts(together, 4), 100)
    assert lift_EE[0, 1] == 2
    assert lift_EE[0, 2] == 0


# specialisation


def test_domain_specialisation_sums_to_k() -> None:
    counts_DE = np.array([[30, 20, 10], [5, 5, 10]])
    share_DE = specialization.domain_spec(counts_DE, counts_DE.sum(axis=1) // 2)
    np.testing.assert_allclose(share_DE.sum(axis=1), 2)


@pytest.mark.parametrize(
    ("model", "top_k", "layer", "maximum", "where"),
    [
        ("olmoe", 8, 0, 0.977, ("arxiv", 0)),
        ("olmoe", 8, 1, 0.848, ("wikipedia", 27)),
        ("olmoe", 8, 2, 0.937, ("arxiv", 17)),
        ("mistral", 2, None, 0.332, None),
    ],
)
def test_published_maxima_of_domain_specialisation(
    model: str, top_k: int, layer: int | None, maximum: float, where: tuple[str, int] | None
) -> None:
    domains = ("arxiv", "book", "c4", "github", "wikipedia")
    counts_DLE = np.stack([published_counts(model, domain) for domain in domains])
    layers = range(3) if layer is None else [layer]
    tables = [
        specialization.domain_spec(counts_DLE[:, at], counts_DLE[:, at].sum(axis=1) / top_k) for at in layers
    ]
    best = max(tables, key=lambda table_DE: table_DE.max())
    assert best.max() == pytest.approx(maximum, abs=6e-4)
    if where is not None:
        domain, expert = np.unravel_index(best.argmax(), best.shape)
        assert (domains[domain], expert) == where


def test_vocabulary_specialisation_equals_a_loop(rng: np.random.Generator, ids_TK: np.ndarray) -> None:
    types_N = rng.integers(100, 120, T)
    kinds_V, occurrences_V, table_VE = specialization.vocab_counts(types_N, ids_TK, E)
    seen = Counter(types_N.tolist())
    used = Counter(
        (kind, expert)
        for kind, token in zip(types_N.tolist(), ids_TK.tolist(), strict=True)
        for expert in token
    )
    for row, kind in enumerate(kinds_V.tolist()):
        assert occurrences_V[row] == seen[kind]
        assert table_VE[row].tolist() == [used[kind, expert] for expert in range(E)]
    best = [max(used[kind, expert] for expert in range(E)) / seen[kind] for kind in kinds_V.tolist()]
    assert specialization.vocab_spec_layer(table_VE, occurrences_V, min_count=1) == pytest.approx(
        np.mean(best)
    )
    weighted = np.average(best, weights=occurrences_V)
    by_token = specialization.vocab_spec_layer(table_VE, occurrences_V, min_count=1, by_token=True)
    assert by_token == pytest.approx(weighted)
    assert math.isnan(specialization.vocab_spec_layer(table_VE, occurrences_V, min_count=10**6))


def test_a_token_seen_once_is_fully_specialised_on_each_of_its_experts() -> None:
    _, occurrences_V, table_VE = specialization.vocab_counts(np.array([7]), np.array([[4, 1, 2]]), E)
    spec_E = specialization.vocab_spec(table_VE, occurrences_V)[0]
    assert np.flatnonzero(spec_E == 1).tolist() == [1, 2, 4]


@pytest.mark.parametrize(
    ("num_experts", "top_k", "expected"),
    [
        (64, 8, {1: 1.00, 5: 0.55, 10: 0.42, 30: 0.285, 100: 0.21}),
        (64, 1, {1: 1.00, 5: 0.23, 10: 0.155, 30: 0.087, 100: 0.05}),
        (8, 2, {1: 1.00, 5: 0.56, 10: 0.47, 30: 0.375, 100: 0.317}),
        (8, 1, {1: 1.00, 5: 0.385, 10: 0.30, 30: 0.22, 100: 0.178}),
    ],
)
def test_rare_tokens_look_specialised_by_chance(
    num_experts: int, top_k: int, expected: dict[int, float]
) -> None:
    for occurrences, value in expected.items():
        null = specialization.vocab_spec_null(occurrences, top_k, num_experts, draws=1000)
        assert null == pytest.approx(value, abs=0.015)


@pytest.mark.parametrize(("num_experts", "top_k"), [(64, 8), (64, 1), (8, 2), (8, 1)])
def test_the_null_of_two_occurrences_follows_from_the_chance_to_meet(num_experts: int, top_k: int) -> None:
    """Seen twice, the largest share is 1 if the two top-k sets meet and 1/2 if they do not."""
    meet = 1 - math.comb(num_experts - top_k, top_k) / math.comb(num_experts, top_k)
    null = specialization.vocab_spec_null(2, top_k, num_experts, draws=10_000)
    assert null == pytest.approx((1 + meet) / 2, abs=0.01)


def test_a_third_of_the_published_token_types_occur_once() -> None:
    archive = np.load(published_folder() / "olmoe_crosslayer_eid2token.npz", allow_pickle=False)
    rows = archive["eid2token/wikipedia/layer7"]
    assignments = np.bincount(rows[:, 1], weights=rows[:, 2])
    once = (assignments == 8).sum() / (assignments > 0).sum()
    assert 0.2 < once < 0.5


def test_expert_token_entropy_is_that_of_each_column() -> None:
    table_CE = np.array([[5, 0, 4], [5, 0, 0]])
    entropy_E = specialization.expert_token_entropy(table_CE)
    np.testing.assert_allclose(entropy_E, [math.log(2), np.nan, 0])


def test_domain_information_given_the_token_removes_what_vocabulary_explains(
    rng: np.random.Generator,
) -> None:
    """Experts that follow the token alone know the domain through it, and nothing beyond it."""
    domains_N = rng.integers(0, 2, 20_000)
    types_N = np.where(rng.random(20_000) < 0.8, 5 * domains_N, 5 * (1 - domains_N)) + rng.integers(
        0, 5, 20_000
    )
    from_token_N = types_N % E
    given = specialization.mi_domain_given_token
    assert given(domains_N, types_N, from_token_N, E) == pytest.approx(0, abs=1e-9)
    assert given(domains_N, types_N, domains_N, E) == pytest.approx(0.5, abs=0.02)
    assert math.isnan(given(domains_N[:20], types_N[:20], from_token_N[:20], E))


def test_repeats_have_the_nulls_of_mixtral_table_5(rng: np.random.Generator) -> None:
    ids_BSK = top_k_ids(rng.random((4, 10_000, 8)), 2)
    assert specialization.repeat_first(ids_BSK) == pytest.approx(1 / 8, abs=0.006)
    assert specialization.repeat_any(ids_BSK) == pytest.approx(0.464, abs=0.006)
    assert specialization.repeat_any_null(2, 8) == pytest.approx(0.464, abs=5e-4)


def test_repeats_are_counted_within_sequences_only() -> None:
    ids_BSK = np.array([[[0, 1], [0, 2]], [[3, 4], [5, 3]]])
    assert specialization.repeat_first(ids_BSK) == 0.5
    assert specialization.repeat_any(ids_BSK) == 1.0


# paths


def test_crossings_join_what_they_say(rng: np.random.Generator, ids_TK: np.ndarray) -> None:
    to_TK = top_k_ids(rng.normal(size=(T, 5)), 2)
    weights_TK = rng.random((T, K))
    first = paths.crossing_counts(ids_TK, to_TK, E, 5)
    every = paths.crossing_counts(ids_TK, to_TK, E, 5, pairs="all", from_weights_TK=weights_TK)
    rank = paths.crossing_counts(ids_TK[:, :2], to_TK, E, 5, pairs="rank")
    expected = {name: np.zeros((E, 5)) for name in ("first", "all", "rank")}
    for token in range(T):
        expected["first"][ids_TK[token, 0], to_TK[token, 0]] += 1
        for a, b in product(range(K), range(2)):
            weight = weights_TK[token, a] / weights_TK[token].sum() / 2
            expected["all"][ids_TK[token, a], to_TK[token, b]] += weight
        for slot in range(2):
            expected["rank"][ids_TK[token, slot], to_TK[token, slot]] += 1
    np.testing.assert_allclose(first, expected["first"])
    np.testing.assert_allclose(every, expected["all"])
    np.testing.assert_allclose(rank, expected["rank"])
    assert every.sum() == pytest.approx(T)


def test_transitions_are_conditional_probabilities() -> None:
    table = paths.transition(np.array([[3, 1], [0, 0]]))
    np.testing.assert_allclose(table, [[0.75, 0.25], [np.nan, np.nan]])


def test_paths_are_counted_as_tuples() -> None:
    found = paths.paths(np.array([[0, 0, 1, 1], [2, 2, 3, 2]]))
    assert (found.tokens, found.distinct) == (4, 3)
    assert found.entropy_nats == pytest.approx(1.5 * math.log(2))
    assert found.effective == pytest.approx(2**1.5)
