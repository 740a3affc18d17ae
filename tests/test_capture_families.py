"""Every family against its own published routing rule, spelled out token by token on the logits it reports itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from capture_models import BIASED, Kept, small_model
from torch import Tensor, nn

from moeviz.capture.failures import ProbeError
from moeviz.capture.probe import attach
from moeviz.capture.sites import find_sites
from moeviz.policy import EVERYTHING
from moeviz.records import LoadRecord, ScoreFunction, TokenRoutingRecord

transformers = pytest.importorskip("transformers", reason="families are Hugging Face models")

B, S, E, K = 2, 7, 8, 3
Rule = Callable[[np.ndarray, np.ndarray, nn.Module], tuple[list[int], np.ndarray]]
"""(logits [E], bias [E], router) of one token -> (its experts, their gate weights)."""


def softmax(z_E: np.ndarray) -> np.ndarray:
    return np.exp(z_E - z_E.max()) / np.exp(z_E - z_E.max()).sum()


def best(scores: np.ndarray, count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda e: -scores[e])[:count]


def softmax_then_topk(norm: bool) -> Rule:
    def rule(z_E: np.ndarray, bias_E: np.ndarray, router: Any) -> tuple[list[int], np.ndarray]:
        p_E = softmax(z_E)
        ids = best(p_E, K)
        return ids, p_E[ids] / (p_E[ids].sum() if norm else 1)

    return rule


def topk_then_softmax(z_E: np.ndarray, bias_E: np.ndarray, router: Any) -> tuple[list[int], np.ndarray]:
    ids = best(z_E, K)
    return ids, softmax(z_E[ids])


def groups_by_max(z_E: np.ndarray, bias_E: np.ndarray, router: Any) -> tuple[list[int], np.ndarray]:
    """DeepSeek-V2: softmax; the best groups by their best expert; weights not normalised."""
    p_E = softmax(z_E)
    allowed = _allowed(p_E, router, lambda group: max(group))
    ids = best(np.where(allowed, p_E, -np.inf), K)
    return ids, p_E[ids] * router.routed_scaling_factor


def groups_by_top2(z_E: np.ndarray, bias_E: np.ndarray, router: Any) -> tuple[list[int], np.ndarray]:
    """DeepSeek-V3, GLM-4.5: sigmoid plus bias; the best groups by the sum of their best two; weights without bias."""
    s_E = 1 / (1 + np.exp(-z_E))
    allowed = _allowed(s_E + bias_E, router, lambda group: sum(sorted(group)[-2:]))
    ids = best(np.where(allowed, s_E + bias_E, -np.inf), K)
    weights = s_E[ids] / (s_E[ids].sum() if router.norm_topk_prob else 1)
    return ids, weights * router.routed_scaling_factor


def _allowed(scores_E: np.ndarray, router: Any, rank: Callable[[np.ndarray], float]) -> np.ndarray:
    groups = scores_E.reshape(router.num_group, -1)
    kept = best(np.array([rank(group) for group in groups]), router.topk_group)
    return np.repeat([group in kept for group in range(router.num_group)], groups.shape[1])


class Family(NamedTuple):
    rule: Rule
    score: ScoreFunction
    config: Mapping[str, Any] = MappingProxyType({})
    has_bias: bool = False
    grouped: bool = False


MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
MLA |= {"num_key_value_heads": 4, "head_dim": None}
GROUPS = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
FAMILIES = {
    "mixtral": Family(softmax_then_topk(norm=True), "softmax"),
    "olmoe": Family(softmax_then_topk(norm=False), "softmax"),
    "qwen2_moe": Family(softmax_then_topk(norm=False), "softmax"),
    "qwen3_moe": Family(softmax_then_topk(norm=True), "softmax", {"norm_topk_prob": True}),
    "gpt_oss": Family(topk_then_softmax, "softmax_topk"),
    "granitemoe": Family(topk_then_softmax, "softmax_topk"),
    "deepseek_v2": Family(
        groups_by_max,
        "softmax",
        {
            **MLA,
            **GROUPS,
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 1.5,
        },
        grouped=True,
    ),
    "deepseek_v3": Family(
        groups_by_top2, "sigmoid", {**MLA, **GROUPS, "q_lora_rank": None}, has_bias=True, grouped=True
    ),
    "glm4_moe": Family(groups_by_top2, "sigmoid", GROUPS, has_bias=True, grouped=True),
    "dots1": Family(groups_by_top2, "sigmoid", GROUPS, has_bias=True, grouped=True),
}
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16}
SIZES |= {"num_experts": E, "num_local_experts": E, "n_routed_experts": E, "num_experts_per_tok": K}
SIZES |= {"shared_expert_intermediate_size": 16, "max_position_embeddings": 64, "initializer_range": 0.3}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(name: str, **changes: Any) -> nn.Module:
    """A tiny random model of a family, in float32, with a selection bias that matters."""
    kind = type(transformers.AutoConfig.for_model(name))
    known = kind()
    wanted = {**SIZES, **changes}
    config = kind(
        **{key: value for key, value in wanted.items() if hasattr(known, key) and value is not None}
    )
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config).float().train()
    for key, value in model.state_dict().items():
        if "correction_bias" in key or "expert_bias" in key:
            value.normal_(std=0.2)
        elif key.endswith(("gate.weight", "router.weight")):
            value.normal_(std=0.5)
    return model


class Watched(NamedTuple):
    load: LoadRecord
    rows: TokenRoutingRecord
    logits: list[Tensor]
    """[T, E] of each MoE layer, as the model reports them."""


def watch_once(model: nn.Module) -> Watched:
    """One forward, with the model's own router logits beside what the probe saw."""
    sink = Kept()
    ids_BS = torch.randint(3, 64, (B, S), generator=torch.Generator().manual_seed(6))
    with attach(model, sink, policy=EVERYTHING) as probe:
        output = model(input_ids=ids_BS, use_cache=False, output_router_logits=True)
        probe.step()
    (load,), (rows,) = sink.of(LoadRecord), sink.of(TokenRoutingRecord)
    return Watched(load, rows, [logits.detach().reshape(B * S, E) for logits in output.router_logits])


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_weights_and_choices_follow_the_rule_of_the_family(name: str) -> None:
    family = FAMILIES[name]
    model = build(name, **family.config)
    sites = find_sites(model)
    assert [(layer.score, layer.has_bias) for layer in sites.info.layers] == [
        (family.score, family.has_bias)
    ] * sites.info.num_layers
    seen = watch_once(model)
    assert len(seen.logits) == sites.info.num_layers
    for layer, (site, logits_TE) in enumerate(zip(sites.routers, seen.logits, strict=True)):
        bias_E = getattr(site.module, "e_score_correction_bias", torch.zeros(E)).double().numpy()
        counts_E, weights_E = np.zeros(E, dtype=np.int64), np.zeros(E)
        for token, z_E in enumerate(logits_TE.double().numpy()):
            ids, weights = family.rule(z_E, bias_E, site.module)
            counts_E[ids] += 1
            weights_E[ids] += weights
            row = (layer, token // S, token % S)
            assert seen.rows.experts_LNSK[row].tolist() == best_first(ids, z_E, bias_E, family.score)
            np.testing.assert_allclose(sorted(seen.rows.weights_LNSK[row]), sorted(weights), rtol=1e-4)
        assert seen.load.counts_LE[layer].tolist() == counts_E.tolist()
        np.testing.assert_allclose(seen.load.weight_sum_LE[layer], weights_E, rtol=1e-4, atol=1e-5)
    assert seen.load.tokens == B * S
    assert ("margin" in seen.load.token_sums) != family.grouped


def best_first(ids: list[int], z_E: np.ndarray, bias_E: np.ndarray, score: ScoreFunction) -> list[int]:
    """Slots by falling selection score."""
    rank_E = 1 / (1 + np.exp(-z_E)) + bias_E if score == "sigmoid" else z_E
    return sorted(ids, key=lambda expert: -rank_E[expert])


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_probabilities_are_those_of_the_score_function(name: str) -> None:
    seen = watch_once(build(name, **FAMILIES[name].config))
    for layer, logits_TE in enumerate(seen.logits):
        p_TE = logits_TE.sigmoid() if name == "deepseek_v3" else logits_TE.softmax(-1)
        p_TE = p_TE / p_TE.sum(-1, keepdim=True)
        assert seen.load.prob_sum_LE is not None
        np.testing.assert_allclose(seen.load.prob_sum_LE[layer], p_TE.sum(0).numpy(), rtol=1e-4)


def test_bias_is_that_of_the_end_of_the_step() -> None:
    model = build("deepseek_v3", **FAMILIES["deepseek_v3"].config)
    routers, sink = find_sites(model).routers, Kept()
    with attach(model, sink) as probe:
        model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False)
        for layer, site in enumerate(routers):
            site.module.e_score_correction_bias.fill_(layer + 0.5)
        probe.step()
    (load,) = sink.of(LoadRecord)
    assert load.bias_LE is not None
    assert load.bias_LE[:, 0].tolist() == [0.5, 1.5]


@pytest.mark.parametrize(
    ("name", "has_bias", "score"),
    [("minimax_m2", True, "sigmoid"), ("ernie4_5_moe", True, "softmax"), ("hy_v3", True, "sigmoid")],
)
def test_bias_is_found_wherever_the_family_keeps_it(name: str, has_bias: bool, score: ScoreFunction) -> None:
    changes = {"moe_num_experts": E, "moe_k": K, "n_group": 1, "topk_group": 1}
    model = build(name, **changes)
    info = find_sites(model).info
    assert {(layer.has_bias, layer.score) for layer in info.layers} == {(has_bias, score)}
    sink = Kept()
    with attach(model, sink) as probe:
        model(input_ids=torch.ones(2, 5, dtype=torch.long) * 3, use_cache=False)
        probe.step()
    (load,) = sink.of(LoadRecord)
    assert load.bias_LE is not None
    assert np.abs(load.bias_LE).max() > 0
    assert "margin" in load.token_sums, "the bias found must explain every choice, or the margin is left out"


@pytest.mark.parametrize("name", ["jetmoe", "llama4_text"])
def test_routers_of_another_form_are_read_too(name: str) -> None:
    model = build(name)
    sink, said = Kept(), {}
    sites = find_sites(model).routers
    for site in sites:
        site.module.register_forward_hook(lambda module, args, output: said.update({module: output}))
    with attach(model, sink, policy=EVERYTHING) as probe:
        model(input_ids=torch.randint(3, 64, (B, S)), use_cache=False)
        probe.step()
    (load,), (rows,) = sink.of(LoadRecord), sink.of(TokenRoutingRecord)
    for layer, site in enumerate(sites):
        chosen = said[site.module][-1].detach().double().topk(site.top_k, dim=-1)
        assert (
            load.counts_LE[layer].tolist() == torch.bincount(chosen.indices.flatten(), minlength=E).tolist()
        )
        gate = chosen.values.sigmoid() if name == "llama4_text" else chosen.values.softmax(-1)
        np.testing.assert_allclose(rows.weights_LNSK[layer].reshape(B * S, -1), gate.numpy(), rtol=1e-4)
        assert (rows.experts_LNSK[layer].reshape(B * S, -1) == chosen.indices.numpy()).all()


def test_own_model_is_recognised_by_its_form() -> None:
    info = find_sites(small_model(router=BIASED)).info
    assert [(layer.block, layer.num_experts, layer.top_k) for layer in info.layers] == [(1, 6, 2), (2, 6, 2)]
    assert {(layer.score, layer.has_bias) for layer in info.layers} == {("sigmoid", True)}
    assert [core.num_heads for core in info.attentions] == [4, 4, 4]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_dense_model_is_refused_by_name(name: str) -> None:
    with pytest.raises(ProbeError, match="dense"):
        attach(build(name), Kept())


def test_unreadable_router_is_refused_with_its_class() -> None:
    model = build("longcat_flash", q_lora_rank=16, kv_lora_rank=16)
    with pytest.raises(ProbeError, match="LongcatFlashTopkRouter"):
        attach(model, Kept())
