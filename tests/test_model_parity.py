"""Configured so, our model is Mixtral, OLMoE, Qwen3-MoE or Llama: same names, logits and gradients.

The twins of transformers are tiny and random. Their state dicts load unchanged.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

from model.config import ModelConfig, RouterConfig
from model.lm import MoELanguageModel
from model.router import TopKRouter

VOCAB = 61
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
OURS = ModelConfig(
    vocab_size=VOCAB,
    dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=64,
    num_experts=4,
    top_k=2,
    expert_dim=24,
)


def _mixtral() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.MixtralConfig(
        **SHAPE, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    )
    return transformers.MixtralForCausalLM(config), {}


def _olmoe() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.OlmoeConfig(**SHAPE, intermediate_size=24, num_experts=4, num_experts_per_tok=2)
    return transformers.OlmoeForCausalLM(config), {
        "qk_norm": "projection",
        "router": RouterConfig(norm_topk=False),
    }


def _qwen3() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.Qwen3MoeConfig(
        **SHAPE,
        head_dim=10,
        moe_intermediate_size=24,
        intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        tie_word_embeddings=True,
    )
    return transformers.Qwen3MoeForCausalLM(config), {
        "qk_norm": "head",
        "head_dim": 10,
        "norm_eps": 1e-6,
        "first_dense_layers": 1,
        "dense_ffn_dim": 40,
        "tie_embeddings": True,
    }


def _llama() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.LlamaConfig(**SHAPE, intermediate_size=40, rms_norm_eps=1e-5)
    return transformers.LlamaForCausalLM(config), {"first_dense_layers": 2, "dense_ffn_dim": 40}


TWINS = {"mixtral": _mixtral, "olmoe": _olmoe, "qwen3": _qwen3, "llama": _llama}


def _twins(family: str) -> tuple[nn.Module, MoELanguageModel]:
    torch.manual_seed(5)
    theirs, changes = TWINS[family]()
    _spread(theirs)
    base = theirs.config.rope_parameters["rope_theta"]
    ours = MoELanguageModel(ModelConfig(**{**vars(OURS), "rope_base": base, **changes}))
    ours.load_state_dict(theirs.state_dict())
    return theirs.train(), ours.train()


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Move weights far from 0.02 and norms from 1: near those values small errors would hide."""
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2)


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", TWINS)
def test_logits_and_gradients_equal_the_twin(family: str) -> None:
    theirs, ours = _twins(family)
    ids_BS = _tokens(3, 12)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids_BS).logits_BSV, theirs(ids_BS).logits, rtol=1e-5, atol=1e-5)
    labels_BS = ids_BS.roll(-1, dims=1)
    labels_BS[:, -1] = -100  # the twin shifts by itself and has no target for the last position
    ours_ce = ours(ids_BS, labels_BS).ce
    theirs_ce = theirs(ids_BS, labels=ids_BS).loss
    torch.testing.assert_close(ours_ce, theirs_ce, rtol=1e-6, atol=1e-6)
    ours_ce.backward()
    theirs_ce.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", TWINS)
def test_left_padding_equals_the_twin_on_real_tokens(family: str) -> None:
    theirs, ours = _twins(family)
    ids_BS = _tokens(2, 9)
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :4] = 0
    with torch.no_grad():
        expected = theirs(ids_BS, attention_mask=mask_BS).logits
        actual = ours(ids_BS, attention_mask_BS=mask_BS).logits_BSV
    real = mask_BS.bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-5, atol=1e-5)


def _router(config: ModelConfig, theirs: nn.Module) -> TopKRouter:
    torch.nn.init.normal_(theirs.weight, std=0.5)
    ours = TopKRouter(config)
    ours.weight.data.copy_(theirs.weight)
    return ours


def _assert_same_routing(ours: TopKRouter, theirs: nn.Module, x_BSD: Tensor, flat: bool) -> None:
    logits, weights, ids = theirs(x_BSD.flatten(0, 1) if flat else x_BSD)
    routing = ours(x_BSD)
    torch.testing.assert_close(routing.logits_TE, logits)
    # Not every router sorts its slots: compare as a table of expert -> weight.
    table = torch.zeros_like(logits).scatter(1, ids, weights)
    torch.testing.assert_close(
        torch.zeros_like(logits).scatter(1, routing.expert_ids_TK, routing.weights_TK), table
    )


def test_router_equals_deepseek_v3() -> None:
    torch.manual_seed(0)
    hf = transformers.DeepseekV3Config(
        hidden_size=16,
        n_routed_experts=12,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    )
    theirs = DeepseekV3TopkRouter(hf)
    router = RouterConfig(
        score="sigmoid", num_groups=4, top_groups=2, group_score="top2_sum", scale=2.5, selection_bias=True
    )
    ours = _router(ModelConfig(dim=16, num_experts=12, top_k=3, router=router), theirs)
    bias_E = torch.randn(12) * 0.3
    for module in (ours, theirs):
        module.e_score_correction_bias.copy_(bias_E)
    _assert_same_routing(ours, theirs, torch.randn(2, 40, 16), flat=False)


def test_router_equals_deepseek_v2() -> None:
    torch.manual_seed(0)
    hf = transformers.DeepseekV2Config(
        hidden_size=16,
        n_routed_experts=12,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        num_attention_heads=2,
        topk_method="group_limited_greedy",
        routed_scaling_factor=1.5,
    )
    theirs = DeepseekV2TopkRouter(hf)
    router = RouterConfig(norm_topk=False, num_groups=4, top_groups=2, group_score="max", scale=1.5)
    ours = _router(ModelConfig(dim=16, num_experts=12, top_k=3, router=router), theirs)
    _assert_same_routing(ours, theirs, torch.randn(2, 40, 16), flat=False)


def test_router_equals_gpt_oss_without_its_bias() -> None:
    torch.manual_seed(0)
    theirs = GptOssTopKRouter(
        transformers.GptOssConfig(hidden_size=16, num_local_experts=6, num_experts_per_tok=3)
    )
    torch.nn.init.zeros_(theirs.bias)
    ours = _router(
        ModelConfig(dim=16, num_experts=6, top_k=3, router=RouterConfig(score="softmax_topk")), theirs
    )
    _assert_same_routing(ours, theirs, torch.randn(2, 40, 16), flat=True)
