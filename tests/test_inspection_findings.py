"""What an analysis says about decisions, weights, outputs and vocabulary equals brute force on the same model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy, spearmanr
from sklearn.metrics import mutual_info_score
from test_inspection_analysis import E, K, L, N, S, loss_of, probe, routing_of, value_of
from test_inspection_trace import VOCAB, opened, tiny_model
from torch import Tensor
from transformers.models.switch_transformers.modeling_switch_transformers import load_balancing_loss_func

from model.config import ModelConfig, RouterConfig
from model.lm import MoELanguageModel
from moeviz.capture.sites import find_sites
from moeviz.errors import MoevizError
from moeviz.inspection import findings
from moeviz.inspection.analysis import analyze
from moeviz.inspection.checkpoint import OpenedCheckpoint
from moeviz.inspection.decisions import balance_losses, decisions, pooled_loss
from moeviz.inspection.expert_weights import gradient_norms, router_rows, weights_apart
from moeviz.inspection.experts_apart import outputs_apart
from moeviz.inspection.over_checkpoints import over_checkpoints
from moeviz.inspection.probe_batch import ProbeBatch
from moeviz.inspection.readings import LayerReading, ModelReading, read_model
from moeviz.inspection.token_classes import CLASSES, class_of, diets
from moeviz.records import AnalysisValue


def quiet_model() -> Any:
    """The tiny model with a small selection bias, so that first choices differ."""
    model = tiny_model().eval()
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias.data *= 0.1
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return quiet_model()


@pytest.fixture(scope="module")
def reading(model: Any) -> ModelReading:
    return read_model(model, find_sites(model).routers, probe().token_ids_NS, lambda: None)


def logits_of_router(model: Any, layer: int) -> np.ndarray:
    x_TD = routing_of(model)[layer][2]
    return (x_TD @ model.model.layers[layer].mlp.gate.weight.T).detach().double().numpy()


def answers_of(model: Any, layer: int) -> tuple[Tensor, Tensor]:
    """(hidden activations [E, T, F], outputs [E, T, D]) of all experts on what the layer was given, written out."""
    experts, x_TD = model.model.layers[layer].mlp.experts, routing_of(model)[layer][2]
    gate_ETF, up_ETF = torch.einsum("td,efd->etf", x_TD, experts.gate_up_proj).chunk(2, dim=-1)
    hidden_ETF = torch.nn.functional.silu(gate_ETF) * up_ETF
    outputs_ETD = torch.einsum("etf,edf->etd", hidden_ETF, experts.down_proj)
    return hidden_ETF.detach().double(), outputs_ETD.detach().double()


def test_decisions_are_those_of_the_logits(model: Any, reading: ModelReading) -> None:
    for layer in range(L):
        found = tuple(decisions(layer, reading.layers[layer], router_rows(find_sites(model).routers[layer])))
        logits_TE, weights_TK = logits_of_router(model, layer), routing_of(model)[layer][1]
        scores_TE = 1 / (1 + np.exp(-logits_TE))
        sorted_TE = np.sort(scores_TE / scores_TE.sum(axis=1, keepdims=True))[:, ::-1]
        expected = {
            "margin12": (sorted_TE[:, 0] - sorted_TE[:, 1]).mean(),
            "gate_mass": sorted_TE[:, :K].sum(axis=1).mean(),
            "gate_eff": (weights_TK.sum(axis=1) ** 2 / (weights_TK**2).sum(axis=1)).mean(),
            "logit_rms": np.sqrt((logits_TE**2).mean()),
            "logit_max": np.abs(logits_TE).max(),
            "lse_mean": np.log(np.exp(logits_TE).sum(axis=1)).mean(),
            "router_norm": float(model.model.layers[layer].mlp.gate.weight.norm()),
            "token_drop": 0,
        }
        for name, value in expected.items():
            assert value_of(found, name, layer) == pytest.approx(value, rel=1e-5, abs=1e-9), name


def test_losses_on_the_probe_are_the_libraries(reading: ModelReading) -> None:
    for layer, one in enumerate(reading.layers):
        found = tuple(balance_losses(layer, one, probe()))
        probs_NSE, ids_NSK = one.probs_TE.reshape(N, S, E), one.ids_TK.reshape(N, S, K)
        switch = load_balancing_loss_func(torch.from_numpy(probs_NSE), torch.from_numpy(ids_NSK))
        assert value_of(found, "aux_seq", layer) == pytest.approx(float(switch) / K)
        share_NE = np.stack([np.bincount(ids_SK[:, 0], minlength=E) / S for ids_SK in ids_NSK])
        gshard = (share_NE * probs_NSE.mean(axis=1)).mean()
        assert value_of(found, "aux_gshard", layer) == pytest.approx(gshard)
        counts_E = np.bincount(one.ids_TK.ravel(), minlength=E)
        chi2 = ((counts_E - counts_E.mean()) ** 2 / counts_E.mean()).sum()
        assert value_of(found, "load_chi2", layer) == pytest.approx(chi2)


def test_the_pooled_loss_is_that_of_transformers() -> None:
    """Layers that collapse onto different experts read as balanced; null_mean is its value at balance."""
    logits_LTE = np.full((2, 6, 4), -9.0)
    logits_LTE[0, :, :2], logits_LTE[1, :, 2:] = 9.0, 9.0
    layers = [made(logits_TE, 2) for logits_TE in logits_LTE]
    (value,) = pooled_loss(layers)
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral

    theirs = float(mixtral(tuple(torch.from_numpy(each) for each in logits_LTE), 4, 2))
    assert value.value == pytest.approx(theirs, rel=1e-5)
    assert value.value == pytest.approx(2, rel=1e-3)
    assert value.null_mean == 2
    assert pooled_loss([layers[0], made(logits_LTE[0], 1)]) == []


def made(logits_TE: np.ndarray, top_k: int) -> LayerReading:
    """A reading of a softmax router without experts."""
    probs_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(axis=1, keepdims=True)
    ids_TK = np.argsort(-logits_TE, axis=1, kind="stable")[:, :top_k]
    return LayerReading(
        ids_TK=ids_TK,
        weights_TK=np.take_along_axis(probs_TE, ids_TK, axis=1),
        probs_TE=probs_TE,
        logits_TE=logits_TE,
        inputs_TD=None,
        experts=None,
    )


def test_outputs_and_weights_of_experts_are_compared_pair_by_pair(model: Any, reading: ModelReading) -> None:
    for layer in range(L):
        hidden_ETF, outputs_ETD = answers_of(model, layer)
        found = tuple(
            outputs_apart(layer, reading.layers[layer]) + weights_apart(layer, reading.layers[layer])
        )
        centred_ETD = outputs_ETD - outputs_ETD.mean(dim=1, keepdim=True)
        alike = []
        for one_TD, other_TD in combinations(centred_ETD, 2):
            cross, own = (one_TD.T @ other_TD).norm() ** 2, (one_TD.T @ one_TD).norm()
            alike.append(float(cross / (own * (other_TD.T @ other_TD).norm())))
        assert value_of(found, "linear_cka", layer) == pytest.approx(np.mean(alike), rel=1e-4)
        assert value_of(found, "linear_cka_max", layer) == pytest.approx(max(alike), rel=1e-4)
        scores_TE = 1 / (1 + np.exp(-logits_of_router(model, layer)))
        probs_TE = scores_TE / scores_TE.sum(axis=1, keepdims=True)
        expected = spearmanr(probs_TE.ravel(), hidden_ETF.norm(dim=-1).T.numpy().ravel()).statistic
        assert value_of(found, "coupling", layer) == pytest.approx(expected, abs=1e-3)
        experts = model.model.layers[layer].mlp.experts
        flat = torch.cat([each.detach().double().flatten(1) for each in experts.parameters()], dim=1)
        cosines = [torch.cosine_similarity(a, b, dim=0).item() for a, b in combinations(flat, 2)]
        assert value_of(found, "expert_w_cos", layer) == pytest.approx(np.mean(cosines))
        assert value_of(found, "expert_w_cos_max", layer) == pytest.approx(max(cosines))
        assert value_of(found, "expert_w_norm", layer, 1) == pytest.approx(float(flat[1].norm()))


def test_representation_collapse_is_that_of_its_matrices(reading: ModelReading) -> None:
    one = reading.layers[0]
    assert one.inputs_TD is not None
    assert len(np.unique(one.ids_TK[:, 0])) > 2
    x_TD, first_T = one.inputs_TD.double().numpy(), one.ids_TK[:, 0]
    groups = [x_TD[first_T == expert] for expert in np.unique(first_T)]
    within_DD = np.mean([np.cov(group, rowvar=False, ddof=0) for group in groups], axis=0)
    between_DD = np.cov(np.stack([group.mean(axis=0) for group in groups]), rowvar=False, ddof=0)
    found = tuple(findings.alike(0, one, None))
    expected = np.trace(within_DD @ np.linalg.pinv(between_DD, hermitian=True, rcond=1e-10))
    assert value_of(found, "rc", 0) == pytest.approx(expected, rel=1e-6)
    assert value_of(found, "rc_ratio", 0) == pytest.approx(
        np.trace(within_DD) / np.trace(between_DD), rel=1e-6
    )


def test_gradients_are_those_of_a_backward_pass(model: Any, reading: ModelReading) -> None:
    found = tuple(gradient_norms(model, reading.layers, probe().token_ids_NS))
    assert all(each.grad is None for each in model.parameters())
    twin = quiet_model()
    ids_NS = torch.from_numpy(probe().token_ids_NS)
    logits_NSV = twin(ids_NS).logits_BSV
    torch.nn.functional.cross_entropy(logits_NSV[:, :-1].flatten(0, 1), ids_NS[:, 1:].flatten()).backward()
    for layer in range(L):
        grads = [each.grad.flatten(1) for each in twin.model.layers[layer].mlp.experts.parameters()]
        norm_E = torch.cat(grads, dim=1).norm(dim=1).tolist()
        counts_E = np.bincount(reading.layers[layer].ids_TK.ravel(), minlength=E)
        for expert in range(E):
            got = value_of(found, "grad_norm_expert", layer, expert)
            assert got == pytest.approx(norm_E[expert], rel=1e-4, abs=1e-9)
            each = value_of(found, "grad_per_token", layer, expert)
            assert each == pytest.approx(norm_E[expert] / max(1, counts_E[expert]), rel=1e-4, abs=1e-9)


def checkpoint_at(step: int, noise: float) -> OpenedCheckpoint:
    """The tiny model with its routers and experts moved by `noise`, as a checkpoint of that step."""
    model = quiet_model()
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for layer in model.model.layers:
            gate = layer.mlp.gate
            for weight in (gate.weight, gate.e_score_correction_bias, *layer.mlp.experts.parameters()):
                weight += noise * torch.randn(weight.shape, generator=generator)
    return replace(opened(model), step=step)


def test_several_checkpoints_tell_when_tokens_settled(model: Any, reading: ModelReading) -> None:
    others = [checkpoint_at(200, 0.2), checkpoint_at(100, 1.0), checkpoint_at(300, 0.02)]
    last = replace(opened(model), step=400)
    found = tuple(over_checkpoints(last, reading, find_sites(model), probe(), others))
    final = [ids_TK[:, 0] for ids_TK, _, _ in routing_of(model)]
    firsts = {other.step: [ids[:, 0] for ids, _, _ in routing_of(other.model)] for other in others}
    for layer in range(L):
        moving = np.zeros(N * S, dtype=bool)
        for step in (300, 200, 100):
            moving |= firsts[step][layer] != final[layer]
            share = value_of(found, "last_fluctuation", layer, label=f"step {step}")
            assert share == pytest.approx(moving.mean())
            now, then = (
                each.model.layers[layer].mlp
                for each in (model, next(o.model for o in others if o.step == step))
            )
            ratio = (now.gate.weight - then.gate.weight).norm() / then.gate.weight.norm()
            label = f"step {step}"
            assert value_of(found, "router_update_ratio", layer, label=label) == pytest.approx(
                float(ratio), rel=1e-4
            )
            rows = [torch.cat([p[2].flatten() for p in mlp.experts.parameters()]) for mlp in (now, then)]
            ratio = (rows[0] - rows[1]).norm() / rows[1].norm()
            assert value_of(found, "update_ratio", layer, 2, label) == pytest.approx(float(ratio), rel=1e-4)
        shares = [
            value_of(found, "last_fluctuation", layer, label=f"step {step}") for step in (100, 200, 300)
        ]
        assert all(early >= late for early, late in pairwise(shares))
        assert shares[0] > 0


def test_one_checkpoint_has_no_last_fluctuation(model: Any, reading: ModelReading) -> None:
    found = over_checkpoints(opened(model), reading, find_sites(model), probe(), [opened(tiny_model())])
    assert {each.name for each in found} >= {"saturation", "flip1", "update_ratio"}
    assert "last_fluctuation" not in {each.name for each in found}


def test_a_checkpoint_of_another_shape_is_refused(model: Any, reading: ModelReading) -> None:
    other = replace(opened(model), token_texts=VOCAB[:3])
    with pytest.raises(MoevizError, match="another vocabulary"):
        over_checkpoints(opened(model), reading, find_sites(model), probe(), [other])


def routed_by(label_T: np.ndarray, num_experts: int = 4) -> LayerReading:
    """A reading whose first choice is a label of the token, and whose second is the next expert."""
    logits_TE = np.zeros((len(label_T), num_experts))
    at_T = np.arange(len(label_T))
    logits_TE[at_T, label_T % num_experts] = 3
    logits_TE[at_T, (label_T + 1) % num_experts] = 2
    return made(logits_TE, 2)


def two_domains(num_seqs: int = 12, length: int = 80, seed: int = 0) -> ProbeBatch:
    """Two domains that share one frequent token and otherwise have tokens of their own."""
    rng = np.random.default_rng(seed)
    ids_NS = rng.integers(1, 5, (num_seqs, length))
    ids_NS[num_seqs // 2 :] += 4
    ids_NS[rng.random(ids_NS.shape) < 0.4] = 0
    return ProbeBatch(token_ids_NS=ids_NS, domains=("a",) * (num_seqs // 2) + ("b",) * (num_seqs // 2))


def test_domain_information_beyond_vocabulary() -> None:
    """Routing by token tells the domain, but nothing beyond the token; routing by domain tells more than the token."""
    batch = two_domains()
    types_T, domains_T = batch.token_ids_NS.ravel(), np.repeat(batch.domain_ids_N, 80)
    by_token = tuple(findings.dependence(0, routed_by(types_T, num_experts=9), batch))
    by_domain = tuple(findings.dependence(0, routed_by(domains_T * 2), batch))
    assert value_of(by_token, "mi_domain", 0) > 0.01
    assert value_of(by_token, "mi_domain_given_token", 0) == pytest.approx(0, abs=1e-12)
    shared = types_T == 0
    expected = mutual_info_score(domains_T[shared], domains_T[shared])
    assert value_of(by_domain, "mi_domain_given_token", 0) == pytest.approx(expected)
    (value,) = [each for each in by_domain if each.name == "mi_domain_given_token"]
    assert not value.hidden
    assert value_of(by_domain, "u_domain", 0) == pytest.approx(1, abs=0.15)
    assert value_of(by_token, "u_domain", 0) < 0.8


def test_vocabulary_is_asked_by_input_next_and_predicted_token(reading: ModelReading) -> None:
    batch = two_domains()
    ids_NS = batch.token_ids_NS
    routing = routed_by(np.roll(ids_NS, -1, axis=1).ravel())  # by the token that follows
    predicted_NS = ids_NS % 3
    found = tuple(findings.vocabulary(0, routing, batch, VOCAB, predicted_NS))
    of_next = value_of(found, "vocab_spec_layer", 0, label="next token")
    assert of_next == pytest.approx(1)
    assert value_of(found, "vocab_spec_layer", 0) < 0.9
    tops = []
    for kind in np.unique(predicted_NS):
        rows = routing.ids_TK[predicted_NS.ravel() == kind]
        tops.append(max(Counter(rows.ravel().tolist()).values()) / len(rows))
    assert value_of(found, "vocab_spec_layer", 0, label="predicted token") == pytest.approx(np.mean(tops))


def test_classes_of_tokens() -> None:
    expected = {
        "\n": "line end",
        "  \n": "line end",
        "ĊĊ": "line end",
        "  ": "white space",
        "▁": "white space",
        "42": "number",
        " 7": "number",
        " (": "punctuation",
        "==": "punctuation",
        " the": "word",
        "Ġthe": "word",
        "▁The": "word, capitalised",
        "ing": "piece of a word",
        "é": "piece of a word",
        " x1": "mixed",
        "don't": "mixed",
        "": "other",
        "→": "other",
    }  # fmt: skip
    assert {text: CLASSES[class_of(text)] for text in expected} == expected


def test_the_diet_of_an_expert_is_the_entropy_of_its_classes() -> None:
    texts = [" the", "ing", "42", ",", "\n", " The", "  ", "x1", "ed", " a"]
    batch = two_domains()
    classes_T = np.array([class_of(texts[kind]) for kind in batch.token_ids_NS.ravel()])
    narrow = routed_by(classes_T, num_experts=9)
    found: tuple[AnalysisValue, ...] = tuple(diets(0, narrow, batch, texts))
    for expert in range(9):
        mine = classes_T[(narrow.ids_TK == expert).any(axis=1)]
        if len(mine):
            counts = np.bincount(mine, minlength=len(CLASSES))
            (value,) = [each for each in found if each.index == expert]
            assert value.value == pytest.approx(entropy(counts))
            assert value.label == CLASSES[int(counts.argmax())]
            assert value.value < value.null_mean
    whole = next(each for each in found if each.part == "layer")
    assert not whole.hidden
    assert whole.value < whole.null_mean < log(len(CLASSES))
    shuffled = routed_by(np.random.default_rng(0).permutation(classes_T), num_experts=9)
    assert next(each for each in diets(0, shuffled, batch, texts) if each.part == "layer").hidden
    assert diets(0, narrow, batch, ()) == []


def test_reading_the_probe_predicts_what_the_model_does(model: Any, reading: ModelReading) -> None:
    with torch.no_grad():
        logits_NSV = model(torch.from_numpy(probe().token_ids_NS)).logits_BSV
    np.testing.assert_array_equal(reading.predicted_NS, logits_NSV.argmax(dim=-1).numpy())
    np.testing.assert_allclose(reading.loss_NS, loss_of(model), rtol=1e-5)
    np.testing.assert_allclose(reading.layers[0].logits_TE, logits_of_router(model, 0), rtol=1e-4, atol=1e-5)


def test_a_model_whose_experts_choose_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=len(VOCAB),
        dim=16,
        num_layers=1,
        num_heads=2,
        num_experts=4,
        top_k=2,
        expert_dim=8,
        max_seq_len=16,
        router=RouterConfig(chooser="expert"),
    )
    with pytest.raises(MoevizError, match="experts choose their tokens"):
        analyze(opened(MoELanguageModel(config)), probe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
