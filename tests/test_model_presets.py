"""Counts are those of the models themselves and of their authors; every preset trains a step and generates."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.attention import set_attention_core
from model.attention_config import LatentConfig, MLAConfig, ReachConfig
from model.attention_core import EagerCore
from model.block_config import BlockConfig
from model.config import ModelConfig
from model.expert_config import ExpertConfig, RouterConfig
from model.flops import attention_flops, forward_flops, mean_keys
from model.generate import Sampling, generate
from model.lm import MoELanguageModel
from model.mla import LatentHeadAttention
from model.presets import PRESETS
from model.published import CLAIMS, PUBLISHED


def narrow(config: ModelConfig) -> ModelConfig:
    """The same wiring with 512 ids, two or three blocks and heads of at most 16: what a test can train."""
    mla = config.mla
    if config.attention == "mla":
        mla = MLAConfig(
            q_lora_rank=mla.q_lora_rank and 12,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
        )
    return replace(
        config,
        vocab_size=512,
        dim=16 * config.num_heads // config.kv_heads,
        num_heads=config.num_heads // config.kv_heads * 2,
        num_kv_heads=None if config.attention == "mla" else 2,
        head_dim=8,
        num_layers=3 if config.first_dense_layers else 2,
        first_dense_layers=min(3, config.first_dense_layers),
        max_seq_len=64,
        mla=mla,
        latents=replace(config.latents, latent_chunk=8),
        reach=replace(config.reach, window=config.reach.window and 8),
        expert_dim=16,
        dense_ffn_dim=None,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_learns_and_generates(name: str) -> None:
    torch.manual_seed(0)
    model = MoELanguageModel(narrow(PRESETS[name]()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids_BS = torch.randint(512, (2, 24), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(4):
        output = model(ids_BS, ids_BS.roll(-1, 1))
        (output.ce + 0.01 * output.aux["balance"].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.ce))
    assert losses[-1] < losses[0] - 0.1
    assert generate(model, ids_BS[:, :5], Sampling(max_new_tokens=4)).shape == (2, 4)


@pytest.mark.parametrize("name", [*PRESETS, *PUBLISHED])
def test_counts_are_those_of_the_model_itself(name: str) -> None:
    config = PUBLISHED[name] if name in PUBLISHED else PRESETS[name]()
    shallow = replace(config, num_layers=min(config.num_layers, config.first_dense_layers + 1))
    with torch.device("meta"):
        model = MoELanguageModel(shallow)
    assert shallow.num_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_that_the_authors_state(name: str) -> None:
    config, claim = PUBLISHED[name], CLAIMS[name]
    assert config.num_parameters() == pytest.approx(claim.parameters, rel=0.01)
    # Authors differ in whether the input embedding is active: ours counts it.
    assert claim.active is not None
    without = config.num_active_parameters() - config.vocab_size * config.dim
    assert without * 0.97 <= claim.active <= config.num_active_parameters() * 1.03


SHAPES: list[dict[str, Any]] = [
    {"num_kv_heads": 2, "attention_bias": "all", "qk_norm": "head"},
    {
        "attention": "mla",
        "mla": MLAConfig(q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=4, qk_rope_head_dim=2),
    },
    {"tie_embeddings": True},
    {"experts": ExpertConfig(expert_activation="gelu"), "block": BlockConfig(positions="learned")},
]


@pytest.mark.parametrize("values", SHAPES)
def test_flops_are_those_that_torch_counts(values: dict[str, Any]) -> None:
    _compare_flops(
        ModelConfig(
            vocab_size=31, dim=16, num_heads=4, num_layers=2, first_dense_layers=2, dense_ffn_dim=11, **values
        )
    )


@pytest.mark.parametrize(
    ("length", "chunk", "latents", "kv_heads"), [(9, 4, 3, 4), (12, 4, 3, 2), (7, 8, 2, 1)]
)
def test_flops_of_two_stage_latents_are_those_that_torch_counts(
    length: int, chunk: int, latents: int, kv_heads: int
) -> None:
    config = ModelConfig(
        vocab_size=31, dim=16, num_heads=4, num_kv_heads=kv_heads, num_layers=2, first_dense_layers=2,
        dense_ffn_dim=11, attention="latent", latents=LatentConfig(num_latents=latents, latent_chunk=chunk),
    )  # fmt: skip
    model = MoELanguageModel(config).eval()
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.int64))
    # Torch multiplies whole squares, of chunks by chunks and of tokens by tokens of a chunk, the last of several
    # filled up; what is read of them is counted one by one here.
    closed, every = length // chunk, -(-length // chunk)
    merges = sum(range(1, closed + 2))
    near = sum(position % chunk + 1 for position in range(length))
    latent_dims, query_dims = 4 * latents * kv_heads * config.head_width, 4 * 4 * config.head_width
    unread = latent_dims * ((closed + 1) ** 2 - merges)
    rows, columns = (every * chunk, chunk) if every > 1 else (length, length)
    unread += query_dims * (rows * (columns + latents) - near - length * latents)
    assert counter.get_total_flops() - 2 * unread == pytest.approx(length * forward_flops(config, length))


# Two-stage latents have a test of their own.
COUNTED = {name: config for name, make in PRESETS.items() if (config := make()).attention != "latent"}


@pytest.mark.parametrize("config", [*COUNTED.values(), *PUBLISHED.values()], ids=[*COUNTED, *PUBLISHED])
def test_flops_of_every_preset_are_those_that_torch_counts(config: ModelConfig) -> None:
    """With experts and a dense layer at most; their biases, which we count as no product, are fetched by one."""
    experts = replace(config.experts, expert_bias=False)
    _compare_flops(
        replace(narrow(config), first_dense_layers=min(1, config.first_dense_layers), experts=experts)
    )


def _compare_flops(config: ModelConfig) -> None:
    length = 9
    model = MoELanguageModel(config).eval()
    set_attention_core(model, EagerCore, config)
    for module in model.modules():
        if isinstance(module, LatentHeadAttention):
            module.absorb = False
    # Products by groups: torch knows no formula for them. [N, I] by [E, I, O].
    grouped = {torch.ops.aten._grouped_mm: lambda rows, weights, *_, **__: 2 * math.prod(rows) * weights[2]}
    counter = FlopCounterMode(display=False, custom_mapping=grouped)
    with counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.int64))
    # The eager core multiplies the whole square, of which a causal query reads the lower half or a window of it.
    square = attention_flops(replace(config, reach=ReachConfig()), length) * 2 * length / (length + 1)
    expected = length * (forward_flops(config, length) - attention_flops(config, length) + square)
    assert counter.get_total_flops() == pytest.approx(expected)


def test_experts_cost_as_much_as_a_dense_layer_of_their_width_and_the_router_on_top() -> None:
    shape: dict[str, Any] = {"vocab_size": 31, "dim": 16, "num_heads": 4, "num_layers": 2}
    moe = ModelConfig(
        **shape,
        num_experts=6,
        top_k=3,
        expert_dim=5,
        num_shared_experts=1,
        router=RouterConfig(router_bias=True),
        experts=ExpertConfig(expert_bias=True),
    )
    dense = ModelConfig(**shape, first_dense_layers=2, dense_ffn_dim=20)
    assert forward_flops(moe) - forward_flops(dense) == 2 * 2 * 6 * 16


def test_keys_within_a_window_are_counted_one_by_one() -> None:
    config = ModelConfig(num_layers=2, reach=ReachConfig(window=4, global_every=2))
    assert mean_keys(config, 0, 10) == sum(min(position + 1, 4) for position in range(10)) / 10
    assert mean_keys(config, 1, 10) == sum(range(1, 11)) / 10
