"""Laws that hold for every metric of a kind, and the counter-examples that each of these designs once got wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from metrics_routing import count_by_loop, load_record, model, published_counts, top_k_ids

from moeviz.alerts import RouterDetector
from moeviz.metrics import (
    coactivation,
    decision,
    importance,
    information,
    layer_shapes,
    live_metrics,
    load,
    losses,
    paths,
    similarity,
    specialization,
)
from moeviz.metrics.decision import normalised_scores
from moeviz.metrics.load_block import LoadBlock

T, E, K = 300, 7, 3


@pytest.fixture(scope="module")
def routing() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logits [T, E], ids [T, K], gate weights [T, K]) of an uneven router."""
    rng = np.random.default_rng(0)
    logits_TE = rng.normal(size=(T, E)) + rng.normal(size=E)
    ids_TK = top_k_ids(logits_TE, K)
    return logits_TE, ids_TK, np.take_along_axis(normalised_scores(logits_TE), ids_TK, axis=1)


def renamed(ids_TK: np.ndarray, order_E: np.ndarray) -> np.ndarray:
    """Ids when expert `order_E[i]` is called i."""
    return np.argsort(order_E)[ids_TK]


def test_renaming_experts_permutes_every_metric_of_an_expert(
    routing: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    _, ids_TK, weights_TK = routing
    rng = np.random.default_rng(1)
    order_E = rng.permutation(E)
    new_TK = renamed(ids_TK, order_E)
    types_T, norms_TK = rng.integers(0, 9, T), rng.random((T, K))
    share_E, new_E = (load.load_share(count_by_loop(ids, E)) for ids in (ids_TK, new_TK))
    np.testing.assert_allclose(new_E, share_E[order_E])
    np.testing.assert_allclose(load.load_rel(new_E), load.load_rel(share_E)[order_E])
    np.testing.assert_allclose(load.coverage(new_E, K), load.coverage(share_E, K)[order_E])
    reap_E = importance.reap(weights_TK, ids_TK, norms_TK, E)
    np.testing.assert_allclose(importance.reap(weights_TK, new_TK, norms_TK, E), reap_E[order_E])
    tables = [specialization.vocab_counts(types_T, ids, E) for ids in (ids_TK, new_TK)]
    specs = [specialization.vocab_spec(table_VE, seen_V) for _, seen_V, table_VE in tables]
    np.testing.assert_allclose(specs[1], specs[0][:, order_E])
    diets = [specialization.expert_token_entropy(table_VE) for _, _, table_VE in tables]
    np.testing.assert_allclose(diets[1], diets[0][order_E])
    pairs, new_pairs = (
        coactivation.coactivation(coactivation.coactivation_counts(ids, E)) for ids in (ids_TK, new_TK)
    )
    np.testing.assert_allclose(new_pairs, pairs[np.ix_(order_E, order_E)])
    crossing, new_crossing = (
        paths.transition(paths.crossing_counts(ids, ids_TK, E, E, pairs="all")) for ids in (ids_TK, new_TK)
    )
    np.testing.assert_allclose(new_crossing, crossing[order_E])


def test_renaming_experts_leaves_every_number_of_a_layer(
    routing: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    logits_TE, ids_TK, weights_TK = routing
    rng = np.random.default_rng(2)
    order_E = rng.permutation(E)
    outputs_TED, labels_T = rng.normal(size=(T, E, 4)), rng.integers(0, 5, T)
    hidden_TD = rng.normal(size=(T, 6))

    def numbers(logits_TE: np.ndarray, ids_TK: np.ndarray, outputs_TED: np.ndarray) -> list[float]:
        probs_TE = normalised_scores(logits_TE)
        share_E = load.load_share(count_by_loop(ids_TK, E))
        known = information.information(labels_T, ids_TK[:, 0], E, rounds=3)
        _, seen_V, table_VE = specialization.vocab_counts(labels_T, ids_TK, E)
        return [
            float(losses.aux_switch(share_E, probs_TE.mean(axis=0))),
            losses.aux_seq(ids_TK.reshape(3, -1, K), probs_TE.reshape(3, -1, E)),
            losses.z_loss(logits_TE),
            decision.route_entropy(probs_TE),
            decision.route_conf(probs_TE),
            decision.margin12(probs_TE),
            decision.margin_sel(probs_TE, K),
            decision.gate_eff(weights_TK),
            decision.gate_mass(probs_TE, K),
            decision.route_mi(probs_TE),
            decision.logit_rms(logits_TE),
            known.plugin,
            known.null_mean,
            specialization.vocab_spec_layer(table_VE, seen_V),
            specialization.repeat_first(ids_TK.reshape(3, -1, K)),
            specialization.repeat_any(ids_TK.reshape(3, -1, K)),
            similarity.pes(outputs_TED),
            similarity.coupling(probs_TE, np.abs(outputs_TED[..., 0])),
            similarity.off_diagonal(similarity.cka_matrix(outputs_TED.transpose(1, 0, 2))).mean,
            *similarity.representation_collapse(hidden_TD, ids_TK[:, 0]),
        ]

    before = numbers(logits_TE, ids_TK, outputs_TED)
    after = numbers(logits_TE[:, order_E], renamed(ids_TK, order_E), outputs_TED[:, order_E])
    np.testing.assert_allclose(after, before)


@pytest.mark.parametrize("top_k", range(2, 9))
def test_every_assignment_of_a_token_counts_from_top_2_to_top_8(top_k: int) -> None:
    """A share is one of all N k assignments: the mean relative load is 1, and k experts can take all tokens."""
    num_experts, tokens = 16, 80
    rng = np.random.default_rng(top_k)
    ids_TK = top_k_ids(rng.random((tokens, num_experts)), top_k)
    collapsed_E = np.r_[np.full(top_k, tokens), np.zeros(num_experts - top_k, dtype=np.int64)]
    counts_LE = np.stack([count_by_loop(ids_TK, num_experts), collapsed_E])
    assert (counts_LE.sum(axis=1) == tokens * top_k).all()
    record = load_record(0, counts_LE, top_k)
    assert record.tokens == tokens
    live = live_metrics(record, *layer_shapes(model(2, num_experts, top_k)))
    share_LE = load.load_share(counts_LE)
    np.testing.assert_allclose(load.load_rel(share_LE).mean(axis=1), 1)
    np.testing.assert_allclose(load.coverage(share_LE, top_k).sum(axis=1), top_k)
    assert live["n_eff"][1] == pytest.approx(top_k)
    assert live["maxvio_batch"][1] == pytest.approx(num_experts / top_k - 1)
    assert live["eff_util"][1] == pytest.approx(0, abs=1e-12)
    assert live["excess_cov"][1] == pytest.approx(1)
    assert live["maxvio_batch"][0] < 1


@pytest.mark.parametrize(("num_experts", "top_k", "tokens"), [(256, 8, 1024), (256, 1, 4096)])
def test_an_even_layer_of_256_experts_is_neither_cold_nor_dead(
    num_experts: int, top_k: int, tokens: int
) -> None:
    """An even share is 0.4 %: rules made for 8 experts would call each of them collapsed."""
    rng = np.random.default_rng(3)
    detector = RouterDetector(model(2, num_experts, top_k))
    alerts = []
    for step in range(400):
        counts_LE = rng.binomial(tokens, top_k / num_experts, (2, num_experts))
        counts_LE[:, step % num_experts] += tokens * top_k - counts_LE.sum(axis=1)
        block = LoadBlock.of([load_record(step, np.maximum(counts_LE, 0), top_k)])
        live, of_step = detector.observe_block(block)
        alerts += of_step[0]
    assert alerts == []
    assert live["n_starved"].tolist() == live["n_dead"].tolist() == [[0, 0]]
    share_LE = detector.statistics.smooth_share_LE
    assert share_LE.max() < 0.05, "every share is under five per cent"
    assert load.eff_util(share_LE, top_k).min() > 0.95


def test_the_mean_over_layers_is_the_loss_that_olmoe_evaluates() -> None:
    """OLMoE's analysis calls the loss of transformers once a layer: k times the mean of aux_switch."""
    from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

    rng = np.random.default_rng(4)
    logits_LTE = rng.normal(size=(3, 50, 8)) * 2 + rng.normal(size=(3, 1, 8))
    theirs = [float(load_balancing_loss_func((torch.from_numpy(each),), 8, 2)) for each in logits_LTE]
    share_LE = np.stack([load.load_share(count_by_loop(top_k_ids(each, 2), 8)) for each in logits_LTE])
    prob_LE = normalised_scores(logits_LTE).mean(axis=1)
    assert 2 * losses.aux_switch(share_LE, prob_LE).mean() == pytest.approx(np.mean(theirs), rel=1e-5)
    assert losses.aux_hf(share_LE, prob_LE, 2) != pytest.approx(np.mean(theirs), rel=1e-3)


def test_published_mixture_of_five_domains_reads_as_documented() -> None:
    """Each domain weighs the same; pooled loads hide what every domain does on its own."""
    domains = ("arxiv", "book", "c4", "github", "wikipedia")
    share_LE = np.mean([load.load_share(published_counts("olmoe", name)) for name in domains], axis=0)
    expected = {
        "load_cv": (0.34, 0.50, 0.52),
        "maxvio": (1.10, 1.75, 1.73),
        "min_load": (0.33, 0.46, 0.38),
        "gini": (0.17, 0.25, 0.27),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(load, name)(share_LE), values, atol=5.1e-3, err_msg=name)
    np.testing.assert_allclose(load.n_eff(share_LE), (60.8, 57.7, 56.9), atol=0.051)
    np.testing.assert_allclose(load.eff_util(share_LE, 8), (0.94, 0.89, 0.87), atol=5.1e-3)
    np.testing.assert_allclose(load.excess_cov(share_LE, 8), (0.16, 0.25, 0.25), atol=5.1e-3)


@pytest.mark.parametrize(("domain", "expected"), [("c4", (0.99, 1.0, 0.98)), ("book", (0.99, 1.0, 0.95))])
def test_published_utilisation_of_mixtral(domain: str, expected: tuple[float, ...]) -> None:
    share_LE = load.load_share(published_counts("mistral", domain))
    np.testing.assert_allclose(load.eff_util(share_LE, 2), expected, atol=5.1e-3)


def test_identities_between_metrics(routing: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    counts_E = count_by_loop(routing[1], E)
    share_E = load.load_share(counts_E)
    assert load.n_eff2(share_E) == pytest.approx(E / (1 + load.load_cv2(share_E)))
    assert load.load_chi2(counts_E) == pytest.approx(counts_E.sum() * load.load_cv(share_E) ** 2)
    assert load.load_imbalance(share_E) == pytest.approx(1 + load.maxvio(share_E))
    assert load.excess_cov(share_E, K) == pytest.approx(load.maxvio(share_E) / (E / K - 1))
    assert load.n_eff(share_E) == pytest.approx(math.exp(load.load_entropy(share_E) * math.log(E)))
    assert load.n_eff2(share_E) <= load.n_eff(share_E) <= E
