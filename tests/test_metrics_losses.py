"""Losses and router decisions against transformers, scipy and loops; why the aux loss detects nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
from metrics_routing import count_by_loop, top_k_ids

from moeviz.metrics import decision, load, losses

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

T, E, K = 30, 6, 2


@pytest.fixture
def logits_LTE() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, T, E)).astype(np.float32) * 2


def shares_and_probs(logits_LTE: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    counts_LE = np.stack([count_by_loop(top_k_ids(z_TE, top_k), z_TE.shape[-1]) for z_TE in logits_LTE])
    probs_LTE = scipy.special.softmax(logits_LTE.astype(np.float64), axis=-1)
    return load.load_share(counts_LE), probs_LTE.mean(axis=1)


def hf_mixtral(layers: tuple, num_experts: int, top_k: int) -> float:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return float(load_balancing_loss_func(layers, num_experts, top_k))


def test_aux_switch_is_the_mixtral_loss_of_one_layer_over_k(logits_LTE: np.ndarray) -> None:
    share_LE, mean_prob_LE = shares_and_probs(logits_LTE, K)
    ours_L = losses.aux_switch(share_LE, mean_prob_LE)
    for layer, z_TE in enumerate(logits_LTE):
        assert K * ours_L[layer] == pytest.approx(hf_mixtral((torch.from_numpy(z_TE),), E, K), rel=1e-5)


def test_aux_hf_is_the_mixtral_loss_of_all_layers(logits_LTE: np.ndarray) -> None:
    layers = tuple(torch.from_numpy(z_TE) for z_TE in logits_LTE)
    assert losses.aux_hf(*shares_and_probs(logits_LTE, K), K) == pytest.approx(
        hf_mixtral(layers, E, K), rel=1e-5
    )


def test_aux_seq_is_the_switch_loss_over_k() -> None:
    from transformers.models.switch_transformers.modeling_switch_transformers import load_balancing_loss_func

    rng = np.random.default_rng(1)
    probs_BSE = scipy.special.softmax(rng.normal(size=(4, 7, E)), axis=-1)
    ids_BSK = top_k_ids(probs_BSE, K)
    theirs = load_balancing_loss_func(torch.from_numpy(probs_BSE), torch.from_numpy(ids_BSK))
    assert losses.aux_seq(ids_BSK, probs_BSE) == pytest.approx(float(theirs) / K, rel=1e-6)


def test_z_loss_is_the_switch_z_loss() -> None:
    from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

    logits_BSE = np.random.default_rng(2).normal(size=(2, 5, E)) * 4
    theirs = float(router_z_loss_func(torch.from_numpy(logits_BSE)))
    assert losses.z_loss(logits_BSE) == pytest.approx(theirs, rel=1e-9)
    assert losses.z_loss(np.zeros((T, E))) == pytest.approx(math.log(E) ** 2)
    assert losses.lse_rms(losses.z_loss(np.zeros((T, E)))) == pytest.approx(math.log(E))


def test_balance_has_the_documented_value_of_each_library() -> None:
    even_E = np.full(E, 1 / E)
    assert losses.aux_switch(even_E, even_E) == pytest.approx(1)
    assert losses.aux_hf(even_E[None], even_E[None], K) == pytest.approx(K)
    assert losses.aux_gshard(np.full((3, E), 5), np.full((3, E), 1 / E)) == pytest.approx(1 / E**2)


def test_the_auxiliary_loss_reads_balanced_in_total_collapse() -> None:
    """A margin of 0.01 sends every token to one expert; the loss says 1.009, the load says all."""
    logits_TE = np.zeros((50, 8))
    logits_TE[:, 0] = 0.01
    share_LE, mean_prob_LE = shares_and_probs(logits_TE[None], 1)
    assert losses.aux_switch(share_LE, mean_prob_LE)[0] == pytest.approx(1.009, abs=5e-4)
    assert load.maxvio(share_LE)[0] == pytest.approx(7)


def test_the_auxiliary_loss_is_not_bounded_by_its_value_at_balance() -> None:
    share_E = load.load_share(np.array([3, 2, 1, 1]))
    prob_E = np.array([0.1, 0.2, 0.35, 0.35])
    assert losses.aux_switch(share_E, prob_E) < 0.9


def test_pooling_layers_hides_that_each_has_collapsed() -> None:
    logits_LTE = np.zeros((8, 40, 8), dtype=np.float32)
    for layer in range(8):
        logits_LTE[layer, :, layer] = 50.0
    share_LE, mean_prob_LE = shares_and_probs(logits_LTE, 1)
    assert hf_mixtral(tuple(torch.from_numpy(z) for z in logits_LTE), 8, 1) == pytest.approx(1.0)
    assert losses.aux_hf(share_LE, mean_prob_LE, 1) == pytest.approx(1.0)
    np.testing.assert_allclose(losses.aux_switch(share_LE, mean_prob_LE), 8.0, rtol=1e-6)


def test_router_orthogonality_is_zero_for_orthonormal_rows_only() -> None:
    rows_ED = np.linalg.qr(np.random.default_rng(3).normal(size=(9, 9)))[0][:4]
    assert losses.router_orth(rows_ED) == pytest.approx(0, abs=1e-12)
    doubled_ED = np.concatenate([rows_ED, rows_ED[:1]])
    assert losses.router_orth(doubled_ED) == pytest.approx(2)
    assert losses.router_orth(doubled_ED, "fro") == pytest.approx(math.sqrt(2))


def test_bias_spans_ignore_padding_and_a_common_shift() -> None:
    bias_LE = np.array([[0.1, -0.3, 9.0], [0.2, 0.2, 0.5]])
    widths_L = np.array([2, 3])
    np.testing.assert_allclose(losses.bias_range(bias_LE, widths_L), [0.4, 0.3])
    np.testing.assert_allclose(
        losses.bias_rms(bias_LE, widths_L), [np.std([0.1, -0.3]), np.std([0.2, 0.2, 0.5])]
    )
    np.testing.assert_allclose(losses.bias_rms(bias_LE + 5, widths_L), losses.bias_rms(bias_LE, widths_L))


@pytest.mark.parametrize(("magnitude", "error"), [(16, 0.0625), (31.9, 0.0625), (128, 0.5), (255, 0.5)])
def test_bf16_rounding_is_what_torch_does(magnitude: float, error: float) -> None:
    assert losses.bf16_rounding(magnitude) == error
    low = 2.0 ** math.floor(math.log2(magnitude))
    grid = torch.linspace(low, 2 * low * 0.99, 4001, dtype=torch.float64)
    measured = (grid.to(torch.bfloat16).to(torch.float64) - grid).abs().max().item()
    assert measured == pytest.approx(error, rel=0.02)


def test_decisions_equal_a_loop_over_tokens() -> None:
    rng = np.random.default_rng(4)
    logits_TE = rng.normal(size=(T, E)) * 3
    probs_TE = decision.normalised_scores(logits_TE)
    np.testing.assert_allclose(probs_TE, scipy.special.softmax(logits_TE, axis=-1))
    rows = [sorted(row, reverse=True) for row in probs_TE.tolist()]
    assert decision.route_entropy(probs_TE) == pytest.approx(
        np.mean(scipy.stats.entropy(probs_TE.T)) / math.log(E)
    )
    assert decision.route_conf(probs_TE) == pytest.approx(np.mean([row[0] for row in rows]))
    assert decision.margin12(probs_TE) == pytest.approx(np.mean([row[0] - row[1] for row in rows]))
    assert decision.margin_sel(probs_TE, K) == pytest.approx(np.mean([row[K - 1] - row[K] for row in rows]))
    assert decision.gate_mass(probs_TE, K) == pytest.approx(np.mean([sum(row[:K]) for row in rows]))
    weights_TK = np.array([row[:K] for row in rows])
    effective = [sum(w) ** 2 / sum(x * x for x in w) for w in weights_TK.tolist()]
    assert decision.gate_eff(weights_TK) == pytest.approx(np.mean(effective))
    assert decision.logit_rms(logits_TE) == pytest.approx(math.sqrt(np.mean(logits_TE**2)))
    assert decision.logit_max(logits_TE) == np.abs(logits_TE).max()
    assert decision.lse_mean(logits_TE) == pytest.approx(scipy.special.logsumexp(logits_TE, axis=-1).mean())


def test_sigmoid_scores_are_normalised_as_in_deepseek_v3() -> None:
    logits_TE = np.random.default_rng(5).normal(size=(T, E))
    scores_TE = torch.sigmoid(torch.from_numpy(logits_TE))
    expected_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    np.testing.assert_allclose(decision.normalised_scores(logits_TE, "sigmoid"), expected_TE.numpy())


def test_routing_information_vanishes_in_collapse_and_in_indecision() -> None:
    balanced_TE = np.eye(E)[np.arange(T) % E]
    assert decision.route_mi(balanced_TE) == pytest.approx(math.log(E))
    assert decision.route_mi(np.tile(np.eye(E)[0], (T, 1))) == pytest.approx(0)
    assert decision.route_mi(np.full((T, E), 1 / E)) == pytest.approx(0)


def test_update_ratio_is_relative() -> None:
    router_ED = np.random.default_rng(6).normal(size=(E, 5))
    assert decision.router_update_ratio(router_ED, 1.1 * router_ED) == pytest.approx(0.1)
