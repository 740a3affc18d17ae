"""Information against scikit-learn and published tables, and the null that keeps small samples honest."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.metrics
from metrics_routing import published_counts, published_folder

from moeviz.metrics import information, paths, specialization

LAYERS = (0, 7, 15)
DOMAINS = ("arxiv", "book", "c4", "github", "wikipedia")


def joint(rng: np.random.Generator, rows: int = 6, columns: int = 9) -> np.ndarray:
    return rng.integers(0, 40, size=(rows, columns))


def test_mutual_information_is_sklearns() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        table = joint(rng)
        expected = sklearn.metrics.mutual_info_score(None, None, contingency=table)
        assert information.mutual_information(table) == pytest.approx(expected, abs=1e-9)


def test_entropies_obey_the_chain_rule() -> None:
    table = joint(np.random.default_rng(1))
    columns = table.sum(axis=0) / table.sum()
    entropy = -(columns * np.log(columns)).sum()
    shared = information.mutual_information(table)
    assert information.conditional_entropy(table) == pytest.approx(entropy - shared)
    assert information.uncertainty_coefficient(table) == pytest.approx(shared / entropy)


def test_a_label_that_decides_the_expert_has_all_the_information() -> None:
    labels_N = np.arange(4000) % 8
    found = information.information(labels_N, labels_N, 8)
    assert found.plugin == pytest.approx(math.log(8))
    assert found.corrected == pytest.approx(math.log(8), abs=0.02)
    assert found.coefficient == pytest.approx(1, abs=0.01)
    assert found.significant


def test_independent_labels_read_high_uncorrected_and_nothing_corrected() -> None:
    """The documented bias: 256 token types, 8 experts, 6,000 tokens read 0.18 nats of nothing."""
    rng = np.random.default_rng(2)
    labels_N, experts_N = rng.integers(0, 256, 6000), rng.integers(0, 8, 6000)
    found = information.information(labels_N, experts_N, 8)
    assert found.plugin == pytest.approx(0.16, abs=0.03)
    assert found.corrected < 0.005
    assert not found.significant


def test_the_correction_agrees_with_adjusted_mutual_information() -> None:
    """AMI subtracts the exact expectation under shuffling; 20 shuffles must come close to it."""
    rng = np.random.default_rng(3)
    labels_N = rng.integers(0, 60, 3000)
    experts_N = np.where(rng.random(3000) < 0.3, labels_N % 8, rng.integers(0, 8, 3000))
    found = information.information(labels_N, experts_N, 8)
    ceiling = (found.expert_nats + np.log(60)) / 2
    expected = sklearn.metrics.adjusted_mutual_info_score(labels_N, experts_N)
    assert found.corrected / (ceiling - found.null_mean) == pytest.approx(expected, abs=0.01)


def sequences_with_habits(rng: np.random.Generator, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(sequence, expert) of tokens: every sequence has its own favourite expert, whatever its domain."""
    sequences_N = np.repeat(np.arange(count), length)
    favourite = rng.integers(0, 8, count)
    experts_N = np.where(
        rng.random(count * length) < 0.7, favourite[sequences_N], rng.integers(0, 8, count * length)
    )
    return sequences_N, experts_N


def test_correlated_tokens_need_the_null_of_whole_sequences() -> None:
    rng = np.random.default_rng(4)
    sequences_N, experts_N = sequences_with_habits(rng, 60, 50)
    domains_N = rng.integers(0, 3, 60)[sequences_N]
    naive = information.information(domains_N, experts_N, 8)
    honest = information.information(domains_N, experts_N, 8, null="sequences", sequences_N=sequences_N)
    assert naive.significant
    assert not honest.significant
    assert honest.plugin == naive.plugin


def test_a_true_domain_effect_survives_the_null_of_whole_sequences() -> None:
    rng = np.random.default_rng(5)
    sequences_N = np.repeat(np.arange(60), 50)
    domains_N = (np.arange(60) % 3)[sequences_N]
    experts_N = np.where(rng.random(3000) < 0.5, domains_N, rng.integers(0, 8, 3000))
    assert information.information(
        domains_N, experts_N, 8, null="sequences", sequences_N=sequences_N
    ).significant


def test_positions_are_tested_by_rotation() -> None:
    rng = np.random.default_rng(6)
    sequences_N, experts_N = sequences_with_habits(rng, 60, 50)
    positions_N = np.tile(np.arange(50), 60)
    options = {"null": "rotations", "sequences_N": sequences_N}
    assert not information.information(positions_N, experts_N, 8, **options).significant
    by_position_N = np.where(rng.random(3000) < 0.5, positions_N % 8, experts_N)
    assert information.information(positions_N, by_position_N, 8, **options).significant


def test_a_null_of_sequences_needs_sequences() -> None:
    with pytest.raises(ValueError, match="sequences_N"):
        information.information(np.zeros(3, dtype=int), np.zeros(3, dtype=int), 2, null="sequences")


@pytest.mark.parametrize(
    ("model", "bits"), [("olmoe", (0.167, 0.400, 0.501)), ("mistral", (0.003, 0.004, 0.009))]
)
def test_published_information_about_domains(model: str, bits: tuple[float, ...]) -> None:
    """The check values that came with the published counts, in bits."""
    for layer, expected in enumerate(bits):
        counts_DE = np.stack([published_counts(model, domain)[layer] for domain in DOMAINS])
        share_DE = counts_DE / counts_DE.sum(axis=1, keepdims=True)
        assert information.mutual_information(share_DE) / math.log(2) == pytest.approx(expected, abs=5.1e-4)
        nats = specialization.nmi_domain(counts_DE) * math.log(len(DOMAINS))
        assert nats == pytest.approx(information.mutual_information(share_DE))


@pytest.mark.parametrize(
    ("model", "top1", "expected"),
    [("olmoe", False, (0.072, 0.172, 0.216)), ("olmoe", True, (0.27, 0.42, 0.44))],
)
def test_published_normalised_information(model: str, top1: bool, expected: tuple[float, ...]) -> None:
    for layer, value in enumerate(expected):
        counts_DE = np.stack([published_counts(model, domain, top1=top1)[layer] for domain in DOMAINS])
        assert specialization.nmi_domain(counts_DE) == pytest.approx(value, abs=5.1e-3)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("olmoe", {"0-7": (0.450, 0.11), "7-15": (0.883, 0.23)}),
        ("mistral", {"0-7": (0.060, 0.03), "7-15": (0.099, 0.05)}),
    ],
)
def test_published_information_across_layers(model: str, expected: dict[str, tuple[float, float]]) -> None:
    archive = np.load(published_folder() / f"{model}_crosslayer_eid2token.npz", allow_pickle=False)
    for pair, (nats, share) in expected.items():
        table = archive[f"expert_counts_crosslayer_top1/c4/{pair}"]
        assert information.mutual_information(table) == pytest.approx(nats, abs=6e-4)
        assert information.uncertainty_coefficient(table) == pytest.approx(share, abs=6e-3)
        rows = paths.transition(table).sum(axis=1)
        np.testing.assert_allclose(rows[~np.isnan(rows)], 1)
