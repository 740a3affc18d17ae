"""Named models, each a function that returns a config. Pick one, or turn one dial (`from_depth`).

The tiny ones have the wiring of a published model at a size that trains on a laptop: what differs from model
to model is the routing, and routing is what there is to see. The vocabulary is replaced by the tokenizer's at
training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from model.attention_config import LatentConfig, MLAConfig, ReachConfig, RopeConfig
from model.block_config import BlockConfig
from model.config import ModelConfig
from model.expert_config import ExpertConfig, RouterConfig

# DeepSeek-V3's routing without groups: a bias balances the load, and no auxiliary loss pulls at the weights.
_BIAS_BALANCED = RouterConfig(score="sigmoid", selection_bias=True)


def demo() -> ModelConfig:
    """The two-minute tour: 3.0M parameters, 400 steps of 16 x 128 tokens on two CPU cores."""
    return ModelConfig(
        dim=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        max_seq_len=256,
        num_experts=8,
        top_k=2,
        expert_dim=128,
        num_shared_experts=1,
        router=_BIAS_BALANCED,
    )


def demo_mla() -> ModelConfig:
    """The demo with MLA: keys and values of four heads from a latent of 48 numbers, queries from one of 64."""
    return replace(
        demo(),
        num_kv_heads=None,
        attention="mla",
        mla=MLAConfig(
            q_lora_rank=64, kv_lora_rank=48, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=32
        ),
    )


def demo_slots() -> ModelConfig:
    """The demo with two-stage attention: past chunks of 32 tokens are read through 16 latents of each key head."""
    return replace(demo(), attention="latent", latents=LatentConfig(num_latents=16, latent_chunk=32))


def minimal() -> ModelConfig:
    """A plain softmax top-2 MoE with wide experts: 6 layers of width 384."""
    return ModelConfig(dim=384, num_layers=6, num_heads=8, num_experts=8, top_k=2, expert_dim=1536)


def optimal() -> ModelConfig:
    """8 layers of width 512 with grouped queries, balanced by bias: 47.2M parameters, 18.9M active."""
    return ModelConfig(
        dim=512,
        num_layers=8,
        num_heads=8,
        num_kv_heads=2,
        num_experts=8,
        top_k=2,
        expert_dim=384,
        router=_BIAS_BALANCED,
    )


def blues() -> ModelConfig:
    """6 layers of width 512 under a vocabulary of 200,020, where the embeddings are most of the model."""
    return ModelConfig(
        vocab_size=200_020,
        dim=512,
        num_layers=6,
        num_heads=8,
        num_kv_heads=2,
        max_seq_len=512,
        num_experts=8,
        top_k=2,
        expert_dim=512,
    )


def latent() -> ModelConfig:
    """12 layers of width 768 that read the past through 16 latents of each key head, with two experts."""
    return ModelConfig(
        dim=768,
        num_layers=12,
        num_heads=4,
        num_kv_heads=2,
        max_seq_len=128,
        attention="latent",
        latents=LatentConfig(num_latents=16, latent_chunk=32),
        num_experts=2,
        top_k=1,
        expert_dim=1024,
    )


def deepseek_glm4() -> ModelConfig:
    """MLA under GLM-4's routing: sigmoid, a selection bias, groups; width 512 (`--dim 256` for the small one)."""
    return ModelConfig(
        dim=512,
        num_layers=8,
        num_heads=8,
        attention="mla",
        mla=MLAConfig(
            q_lora_rank=192, kv_lora_rank=96, qk_nope_head_dim=48, qk_rope_head_dim=16, v_head_dim=48
        ),
        first_dense_layers=1,
        num_experts=16,
        top_k=4,
        expert_dim=192,
        num_shared_experts=1,
        router=replace(_BIAS_BALANCED, num_groups=4, top_groups=2),
    )


def code_828() -> ModelConfig:
    """A code model: few wide experts in two groups, sinks, YaRN from 512 to 2,048 tokens, 49,152 ids."""
    return ModelConfig(
        vocab_size=49_152,
        dim=512,
        num_layers=8,
        num_heads=8,
        num_kv_heads=2,
        max_seq_len=2048,
        rope=RopeConfig(rope_scaling="yarn", rope_factor=4.0, rope_trained_len=512),
        reach=ReachConfig(head_sinks=True),
        num_experts=4,
        top_k=2,
        expert_dim=768,
        num_shared_experts=1,
        router=replace(_BIAS_BALANCED, num_groups=2, top_groups=2),
    )


def code_800m() -> ModelConfig:
    """The large plan of code-828: 24 layers of width 1,536 with 8 experts."""
    return replace(
        code_828(),
        dim=1536,
        num_layers=24,
        num_heads=24,
        num_kv_heads=8,
        num_experts=8,
        router=replace(_BIAS_BALANCED, num_groups=2, top_groups=2),
    )


def mixtral_tiny() -> ModelConfig:
    """Mixtral's wiring (arXiv:2401.04088).

    Softmax, top-2 of 8, gate weights that sum to 1, no shared expert.
    """
    return ModelConfig(
        dim=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        rope_base=1_000_000.0,
        num_experts=8,
        top_k=2,
        expert_dim=448,
    )


def olmoe_tiny() -> ModelConfig:
    """OLMoE's wiring (arXiv:2409.02060).

    Many small experts, gate weights not normalised, queries and keys are.
    """
    return ModelConfig(
        dim=256,
        num_layers=4,
        num_heads=4,
        qk_norm="projection",
        num_experts=64,
        top_k=8,
        expert_dim=128,
        router=RouterConfig(norm_topk=False),
    )


def qwen3_tiny() -> ModelConfig:
    """Qwen3-MoE's wiring (arXiv:2505.09388).

    Many small experts, weights that sum to 1, each head normalised.
    """
    return ModelConfig(
        dim=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        qk_norm="head",
        norm_eps=1e-6,
        rope_base=1_000_000.0,
        tie_embeddings=True,
        num_experts=32,
        top_k=4,
        expert_dim=96,
    )


def deepseek_v3_tiny() -> ModelConfig:
    """DeepSeek-V3's wiring (arXiv:2412.19437).

    MLA, a dense first block, a shared expert, sigmoid scores in groups, a selection bias.
    """
    return ModelConfig(
        dim=256,
        num_layers=4,
        num_heads=8,
        attention="mla",
        mla=MLAConfig(
            q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
        ),
        rope=RopeConfig(rope_pairs="neighbours"),
        norm_eps=1e-6,
        first_dense_layers=1,
        num_experts=32,
        top_k=4,
        expert_dim=96,
        num_shared_experts=1,
        router=replace(_BIAS_BALANCED, num_groups=4, top_groups=2, scale=2.5),
    )


def glm4_tiny() -> ModelConfig:
    """GLM-4.5's wiring (arXiv:2508.06471).

    Grouped queries of which half of each head turns, heads normalised, DeepSeek-V3's routing without groups.
    """
    return ModelConfig(
        dim=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        attention_bias="qkv",
        qk_norm="head",
        rope=RopeConfig(rotary_share=0.5),
        first_dense_layers=1,
        num_experts=32,
        top_k=4,
        expert_dim=96,
        num_shared_experts=1,
        router=replace(_BIAS_BALANCED, scale=2.5),
    )


def gpt_oss_tiny() -> ModelConfig:
    """GPT-OSS's wiring (arXiv:2508.10925).

    A sink per head, windows in every other layer, biases everywhere, clamped experts, softmax after top-k.
    """
    return ModelConfig(
        dim=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        attention_bias="all",
        rope_base=150_000.0,
        reach=ReachConfig(window=128, global_every=2, head_sinks=True),
        num_experts=16,
        top_k=4,
        expert_dim=128,
        router=RouterConfig(score="softmax_topk", router_bias=True),
        experts=ExpertConfig(expert_activation="clamped", expert_bias=True),
    )


def gpt2() -> ModelConfig:
    """GPT-2's smallest (Radford et al. 2019), dense, for comparison: 12 layers of width 768, 124M parameters."""
    return ModelConfig(
        vocab_size=50_257,
        dim=768,
        num_layers=12,
        num_heads=12,
        max_seq_len=1024,
        attention_bias="all",
        tie_embeddings=True,
        first_dense_layers=12,
        dense_ffn_dim=4 * 768,
        block=BlockConfig(norm="layer", positions="learned", dense_layer="gelu"),
    )


def gpt2_tiny() -> ModelConfig:
    """GPT-2's wiring at the demo's size: what a token costs there it costs here, without experts."""
    size = demo()
    return replace(
        gpt2(),
        vocab_size=size.vocab_size,
        dim=size.dim,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        max_seq_len=size.max_seq_len,
        tie_embeddings=False,
        first_dense_layers=size.num_layers,
        dense_ffn_dim=4 * size.dim,
    )


PRESETS: Mapping[str, Callable[[], ModelConfig]] = MappingProxyType(
    {
        "demo": demo,
        "demo-mla": demo_mla,
        "demo-slots": demo_slots,
        "minimal": minimal,
        "optimal": optimal,
        "blues": blues,
        "latent": latent,
        "deepseek-glm4": deepseek_glm4,
        "code-828": code_828,
        "code-800m": code_800m,
        "mixtral-tiny": mixtral_tiny,
        "olmoe-tiny": olmoe_tiny,
        "qwen3-tiny": qwen3_tiny,
        "deepseek-v3-tiny": deepseek_v3_tiny,
        "glm4-tiny": glm4_tiny,
        "gpt-oss-tiny": gpt_oss_tiny,
        "gpt2": gpt2,
        "gpt2-tiny": gpt2_tiny,
    }
)
"""Every preset by the name that the command line takes."""


def from_depth(depth: int) -> ModelConfig:
    """A sensible MoE from one number, the count of blocks.

    Width grows with depth (64 per block, heads of 64). The number of experts is the power of two nearest to
    four per block, at least 8, and the experts that a token uses, with one shared, are together as wide as
    the feed-forward layer of a dense Llama: 8/3 of the width.
    """
    if depth < 1:
        raise ValueError(f"depth={depth} is below 1; a model needs a block")
    dim = 64 * depth
    num_experts = max(8, 1 << _round_log2(4 * depth))
    top_k = 2 if num_experts <= 16 else 4 if num_experts <= 64 else 8
    return ModelConfig(
        dim=dim,
        num_layers=depth,
        num_heads=depth,
        num_kv_heads=depth // next(group for group in (4, 3, 2, 1) if depth % group == 0),
        first_dense_layers=1 if depth >= 8 else 0,
        num_experts=num_experts,
        top_k=top_k,
        expert_dim=_round_up(8 * dim // (3 * (top_k + 1)), 32),
        num_shared_experts=1,
        router=_BIAS_BALANCED,
    )


def _round_log2(number: int) -> int:
    """Exponent of the power of two nearest to `number` by ratio."""
    exponent = number.bit_length() - 1
    return exponent + (number * number > 2 << 2 * exponent)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
