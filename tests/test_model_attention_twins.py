"""Configured so, our attention is that of Mixtral, GPT-OSS, Gemma 3, Qwen2, DeepSeek-V2 and V3, biases included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3RotaryEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

from model.attention import Attention
from model.attention_config import MLAConfig, ReachConfig, RopeConfig
from model.attention_core import EagerCore, SdpaCore
from model.config import ModelConfig, RouterConfig
from model.kv_cache import KVCache
from model.lm import MoELanguageModel
from model.mla import LatentHeadAttention
from model.rope import rope_tables

VOCAB, LENGTH, WINDOW = 53, 21, 5
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
OURS: dict[str, Any] = {"vocab_size": VOCAB, "dim": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 64}
MLA: dict[str, Any] = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10_000.0,
}
YARN_OURS: dict[str, Any] = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_trained_len": 16}


def _mixtral() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.MixtralConfig(
        **SHAPE, num_key_value_heads=2, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=WINDOW, attn_implementation="eager",
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config), {
        "num_kv_heads": 2, "num_experts": 4, "expert_dim": 24, "reach": ReachConfig(window=WINDOW),
        "rope_base": config.rope_parameters["rope_theta"],
    }  # fmt: skip


def _qwen2() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.Qwen2Config(**SHAPE, num_key_value_heads=2, intermediate_size=40)
    return transformers.Qwen2ForCausalLM(config), {
        "num_kv_heads": 2, "attention_bias": "qkv", "first_dense_layers": 2, "dense_ffn_dim": 40,
        "norm_eps": 1e-6, "rope_base": config.rope_parameters["rope_theta"],
    }  # fmt: skip


def _deepseek_v3() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.DeepseekV3Config(
        **SHAPE, **MLA, num_key_value_heads=4, q_lora_rank=14, attention_bias=True, intermediate_size=40,
        moe_intermediate_size=24, first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=2,
        n_group=4, topk_group=2, n_shared_experts=1, routed_scaling_factor=2.5,
        rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    )  # fmt: skip
    router = RouterConfig(score="sigmoid", num_groups=4, top_groups=2, scale=2.5, selection_bias=True)
    return transformers.DeepseekV3ForCausalLM(config), {
        "mla": MLAConfig(q_lora_rank=14, **MLA), "router": router, "first_dense_layers": 1,
        "rope": RopeConfig(**YARN_OURS, rope_pairs="neighbours", yarn_mscale=1.0, yarn_mscale_all_dim=1.0),
    }  # fmt: skip


def _deepseek_v2() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.DeepseekV2Config(
        **SHAPE, **MLA, num_key_value_heads=4, q_lora_rank=None, attention_bias=True, intermediate_size=40,
        moe_intermediate_size=24, first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=2,
        topk_method="group_limited_greedy", n_group=4, topk_group=2, n_shared_experts=1,
        routed_scaling_factor=1.5,
    )  # fmt: skip
    router = RouterConfig(num_groups=4, top_groups=2, group_score="max", scale=1.5, norm_topk=False)
    return transformers.DeepseekV2ForCausalLM(config), {
        "mla": MLAConfig(**MLA), "router": router, "first_dense_layers": 1,
        "rope": RopeConfig(rope_pairs="neighbours"),
    }  # fmt: skip


DEEPSEEK: dict[str, Any] = {
    "attention": "mla", "attention_bias": "all", "norm_eps": 1e-6, "dense_ffn_dim": 40, "num_experts": 8,
    "expert_dim": 24, "num_shared_experts": 1,
}  # fmt: skip
TWINS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (_mixtral, {}),
    "qwen2": (_qwen2, {}),
    "deepseek-v2": (_deepseek_v2, DEEPSEEK),
    "deepseek-v3": (_deepseek_v3, DEEPSEEK),
}


def _twins(family: str) -> tuple[nn.Module, MoELanguageModel]:
    torch.manual_seed(5)
    make, common = TWINS[family]
    theirs, changes = make()
    _spread(theirs)
    ours = MoELanguageModel(ModelConfig(**{**OURS, **common, **changes}))
    ours.load_state_dict(theirs.state_dict())
    assert sum(p.numel() for p in theirs.parameters()) == ours.config.num_parameters()
    return theirs.train(), ours.train()


@torch.no_grad()
def _spread(module: nn.Module) -> None:
    """Weights far from 0.02, norms from 1, biases and sinks from 0: near those values errors would hide."""
    for name, parameter in module.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    for buffer in module.buffers():
        if buffer.is_floating_point() and buffer.shape == (8,):
            buffer.normal_(0.0, 0.3)


def _ids(batch: int = 3) -> Tensor:
    return torch.randint(VOCAB, (batch, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", TWINS)
def test_logits_and_gradients_equal_the_twin(family: str) -> None:
    theirs, ours = _twins(family)
    ids_BS = _ids()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids_BS).logits_BSV, theirs(ids_BS).logits, rtol=1e-4, atol=1e-4)
    labels_BS = ids_BS.roll(-1, dims=1)
    labels_BS[:, -1] = -100
    ours(ids_BS, labels_BS).ce.backward()
    theirs(ids_BS, labels=ids_BS).loss.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = expected[name].grad.abs().max().item()
        torch.testing.assert_close(
            parameter.grad,
            expected[name].grad,
            rtol=1e-4,
            atol=1e-5 * scale + 1e-8,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("family", TWINS)
def test_left_padding_equals_the_twin_on_real_tokens(family: str) -> None:
    theirs, ours = _twins(family)
    ids_BS = _ids(2)
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :4] = 0
    with torch.no_grad():
        expected = theirs(ids_BS, attention_mask=mask_BS).logits
        actual = ours(ids_BS, attention_mask_BS=mask_BS).logits_BSV
    real = mask_BS.bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-4)


def _causal(window: int | None) -> Tensor:
    """The additive mask of a transformers layer, [1, 1, S, S]."""
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    hidden = (key > query) if window is None else (key > query) | (key <= query - window)
    return torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(hidden, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("core", [SdpaCore, EagerCore])
def test_attention_of_gpt_oss(layer: int, core: Any) -> None:
    """Sinks, all biases, a window in every other layer, YaRN without truncation."""
    torch.manual_seed(0)
    hf = transformers.GptOssConfig(
        **SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=WINDOW, attn_implementation="eager",
        rope_parameters={**YARN, "truncate": False},
    )  # fmt: skip
    theirs = GptOssAttention(hf, layer)
    _spread(theirs)
    config = ModelConfig(
        **OURS, num_kv_heads=2, head_dim=8, attention_bias="all", rope=RopeConfig(**YARN_OURS, yarn_truncate=False),
        reach=ReachConfig(window=WINDOW, global_every=2, head_sinks=True),
    )  # fmt: skip
    ours = Attention(config, layer)
    ours.load_state_dict(theirs.state_dict())
    ours.core = core(config, layer)
    assert (theirs.sliding_window is None) == (ours.core.window is None)
    x_BSD = torch.randn(2, LENGTH, 32, requires_grad=True)
    turns = GptOssRotaryEmbedding(hf)(x_BSD, torch.arange(LENGTH)[None])
    expected = theirs(x_BSD, turns, _causal(theirs.sliding_window))[0]
    actual = ours(x_BSD, rope_tables(config, 0, LENGTH, x_BSD))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    names = [name for name, _ in ours.named_parameters()]
    upstream = torch.randn_like(expected)
    wanted = dict(theirs.named_parameters())
    ours_grads = torch.autograd.grad(actual, [*ours.parameters(), x_BSD], upstream)
    their_grads = torch.autograd.grad(expected, [*(wanted[name] for name in names), x_BSD], upstream)
    for got, want in zip(ours_grads, their_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", range(6))
def test_attention_of_gemma3(layer: int) -> None:
    """Five local layers with a base of their own, then a global one, stretched; heads normalised."""
    torch.manual_seed(0)
    hf = transformers.Gemma3TextConfig(
        **{**SHAPE, "num_hidden_layers": 6}, num_key_value_heads=2, head_dim=8, sliding_window=WINDOW,
        query_pre_attn_scalar=8, attn_implementation="eager", rms_norm_eps=1e-6,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
        },
    )  # fmt: skip
    theirs = Gemma3Attention(hf, layer)
    _spread(theirs)
    config = ModelConfig(
        **{**OURS, "num_layers": 6}, num_kv_heads=2, head_dim=8, qk_norm="head", norm_eps=1e-6, rope_base=5000.0,
        rope=RopeConfig(rope_scaling="linear", rope_factor=8.0, local_rope_base=100.0),
        reach=ReachConfig(window=WINDOW, global_every=6),
    )  # fmt: skip
    ours = Attention(config, layer)
    state = theirs.state_dict()
    for name in ("q_norm.weight", "k_norm.weight"):
        state[name] = state[name] + 1  # Gemma stores the distance from 1
    ours.load_state_dict(state)
    local = config.reach.is_local(layer)
    assert local == theirs.is_sliding
    x_BSD = torch.randn(2, LENGTH, 32)
    turns = Gemma3RotaryEmbedding(hf)(x_BSD, torch.arange(LENGTH)[None], theirs.layer_type)
    expected = theirs(x_BSD, turns, _causal(theirs.sliding_window))[0]
    actual = ours(x_BSD, rope_tables(config, 0, LENGTH, x_BSD, local=local))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["deepseek-v2", "deepseek-v3"])
@pytest.mark.parametrize("pieces", [[21], [9, 12], [17, 1, 1, 1, 1]], ids=str)
def test_absorbed_equals_expanded(family: str, pieces: list[int]) -> None:
    _, ours = _twins(family)
    ids_BS = _ids()
    layers = [m for m in ours.modules() if isinstance(m, LatentHeadAttention)]
    logits = []
    with torch.no_grad():
        for absorb in (False, True):
            for layer in layers:
                layer.absorb = absorb
            cache = KVCache(ours.config, batch_size=3)
            logits.append(
                torch.cat([ours(piece, cache=cache).logits_BSV for piece in ids_BS.split(pieces, 1)], 1)
            )
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits[1], logits[0])  # they are two computations


def test_decoding_absorbs_and_reading_a_text_expands() -> None:
    _, ours = _twins("deepseek-v3")
    shapes: list[tuple[int, ...]] = []
    core = ours.model.layers[0].self_attn.core
    core.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[1].shape)))
    cache = KVCache(ours.config, batch_size=3)
    ours(_ids(), cache=cache)
    ours(_ids()[:, :1], cache=cache)
    assert shapes == [(3, 4, LENGTH, 6 + 4), (3, 1, LENGTH + 1, 12 + 4)]


def test_the_latent_passes_a_boundary() -> None:
    _, ours = _twins("deepseek-v3")
    seen: list[Tensor] = []
    attention = ours.model.layers[1].self_attn
    attention.latents.register_forward_hook(lambda module, args, out: seen.append(out))
    inputs: list[Tensor] = []
    attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    ours(_ids())
    down = attention.kv_a_proj_with_mqa(inputs[0])[..., :12]
    expected = down * (down.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * attention.kv_a_layernorm.weight
    torch.testing.assert_close(seen[0], expected)
