"""Published models at full size, with the numbers that their authors state, to check our counting against.

Nobody trains these here: they are configs, counted by formula. Authors count differently: some leave the
input embeddings out of the active parameters, some count extra blocks for multi-token prediction, and all
round. The claims are printed beside our counts and not adjusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from model.attention_config import MLAConfig, ReachConfig, RopeConfig
from model.config import ModelConfig
from model.expert_config import ExpertConfig, RouterConfig
from model.presets import gpt2


class Claim(NamedTuple):
    """What the authors state, in numbers of parameters; None where they do not."""

    parameters: float
    active: float | None
    source: str


CLAIMS: Mapping[str, Claim] = MappingProxyType(
    {
        "optimal": Claim(47e6, 13e6, "as published with the preset"),
        "mixtral-8x7b": Claim(46.7e9, 12.9e9, "mistral.ai/news/mixtral-of-experts"),
        "olmoe-1b-7b": Claim(6.9e9, 1.3e9, "arXiv:2409.02060"),
        "qwen3-30b-a3b": Claim(30.5e9, 3.3e9, "arXiv:2505.09388"),
        "deepseek-v3": Claim(671e9, 37e9, "arXiv:2412.19437"),
        "glm-4.5": Claim(355e9, 32e9, "arXiv:2508.06471"),
        "gpt-oss-20b": Claim(20.9e9, 3.6e9, "arXiv:2508.10925"),
        "gpt2": Claim(124e6, 124e6, "github.com/openai/gpt-2, README"),
    }
)
"""Claims by the name of a preset or of a model below."""

_SIGMOID = RouterConfig(score="sigmoid", selection_bias=True, scale=2.5)

PUBLISHED: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "mixtral-8x7b": ModelConfig(
            vocab_size=32_000,
            dim=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            max_seq_len=32_768,
            rope_base=1e6,
            num_experts=8,
            top_k=2,
            expert_dim=14_336,
        ),
        "olmoe-1b-7b": ModelConfig(
            vocab_size=50_304,
            dim=2048,
            num_layers=16,
            num_heads=16,
            max_seq_len=4096,
            qk_norm="projection",
            num_experts=64,
            top_k=8,
            expert_dim=1024,
            router=RouterConfig(norm_topk=False),
        ),
        "qwen3-30b-a3b": ModelConfig(
            vocab_size=151_936,
            dim=2048,
            num_layers=48,
            num_heads=32,
            num_kv_heads=4,
            head_dim=128,
            max_seq_len=40_960,
            qk_norm="head",
            norm_eps=1e-6,
            rope_base=1e6,
            num_experts=128,
            top_k=8,
            expert_dim=768,
        ),
        "deepseek-v3": ModelConfig(
            vocab_size=129_280,
            dim=7168,
            num_layers=61,
            num_heads=128,
            max_seq_len=4096,
            attention="mla",
            mla=MLAConfig(
                q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
            ),
            rope=RopeConfig(rope_pairs="neighbours"),
            norm_eps=1e-6,
            first_dense_layers=3,
            dense_ffn_dim=18_432,
            num_experts=256,
            top_k=8,
            expert_dim=2048,
            num_shared_experts=1,
            router=RouterConfig(score="sigmoid", selection_bias=True, scale=2.5, num_groups=8, top_groups=4),
        ),
        "glm-4.5": ModelConfig(
            vocab_size=151_552,
            dim=5120,
            num_layers=92,
            num_heads=96,
            num_kv_heads=8,
            head_dim=128,
            max_seq_len=131_072,
            attention_bias="qkv",
            qk_norm="head",
            rope_base=1e6,
            rope=RopeConfig(rotary_share=0.5),
            first_dense_layers=3,
            dense_ffn_dim=12_288,
            num_experts=160,
            top_k=8,
            expert_dim=1536,
            num_shared_experts=1,
            router=_SIGMOID,
        ),
        "gpt-oss-20b": ModelConfig(
            vocab_size=201_088,
            dim=2880,
            num_layers=24,
            num_heads=64,
            num_kv_heads=8,
            head_dim=64,
            max_seq_len=131_072,
            attention_bias="all",
            rope_base=150_000.0,
            rope=RopeConfig(
                rope_scaling="yarn", rope_factor=32.0, rope_trained_len=4096, yarn_truncate=False
            ),
            reach=ReachConfig(window=128, global_every=2, head_sinks=True),
            num_experts=32,
            top_k=4,
            expert_dim=2880,
            router=RouterConfig(score="softmax_topk", router_bias=True),
            experts=ExpertConfig(expert_activation="clamped", expert_bias=True),
        ),
        "gpt2": gpt2(),
    }
)
"""Models by name."""
