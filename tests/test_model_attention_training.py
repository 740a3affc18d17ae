"""Whatever the attention, training is the same compiled, recomputed or not, and every weight learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention_config import LatentConfig, MLAConfig, ReachConfig, RopeConfig
from model.config import ModelConfig
from model.lm import ModelOutput, MoELanguageModel

MLA = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
YARN: dict[str, Any] = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_trained_len": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "sinks, local-global": {
        "num_kv_heads": 2, "attention_bias": "all", "rope": RopeConfig(**YARN, local_rope_base=100.0),
        "reach": ReachConfig(window=4, global_every=2, head_sinks=True, sink_tokens=1),
    },
    "pattern": {"reach": ReachConfig(sparsity="strided", sparse_block=3), "rope": RopeConfig(rotary_share=0.5)},
    "mla": {"attention": "mla", "attention_bias": "all", "mla": MLAConfig(q_lora_rank=12, **MLA)},
    "mla, sinks in a window": {
        "attention": "mla", "mla": MLAConfig(**MLA), "rope": RopeConfig(rope_pairs="neighbours"),
        "reach": ReachConfig(window=4, head_sinks=True),
    },
    "two-stage": {
        "attention": "latent", "num_kv_heads": 2, "latents": LatentConfig(num_latents=3, latent_chunk=4),
    },
}  # fmt: skip


def _model(name: str, std: float = 0.2) -> MoELanguageModel:
    torch.manual_seed(2)
    config = ModelConfig(
        vocab_size=37, dim=32, num_layers=2, num_heads=4, max_seq_len=32, num_experts=4, expert_dim=16,
        init_std=std, **VARIANTS[name],
    )  # fmt: skip
    return MoELanguageModel(config).train()


def _ids(batch: int = 3, length: int = 11) -> Tensor:
    return torch.randint(37, (batch, length), generator=torch.Generator().manual_seed(7))


def _train(model: Any) -> ModelOutput:
    out: ModelOutput = model(_ids(), _ids().roll(-1, dims=1))
    assert out.ce is not None
    (out.ce + 0.01 * out.aux["balance"].sum()).backward()
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_recomputing_changes_no_bit(name: str) -> None:
    model = _model(name)
    runs = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        out = _train(model)
        runs.append((out.ce, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (ce, grads), (other_ce, other_grads) = runs
    assert torch.equal(ce, other_ce)
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_compiling_gives_one_graph_and_the_same_numbers(name: str) -> None:
    model = _model(name)
    eager = _train(model)
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    out = _train(torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager"))
    torch.testing.assert_close(out.ce, eager.ce, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.expert_counts_LE, eager.expert_counts_LE)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_learns_and_is_counted(name: str) -> None:
    model = _model(name)
    _train(model)
    assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters()
    assert [key for key, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


@pytest.mark.parametrize("name", VARIANTS)
def test_steps_down_the_gradient_lower_the_loss(name: str) -> None:
    model = _model(name, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        ce = _train(model).ce
        assert ce is not None
        losses.append(ce.item())
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_and_autocast_stay_near_float32(name: str) -> None:
    model = _model(name, std=0.1)
    exact = model(_ids(), _ids().roll(-1, dims=1)).ce
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = _train(model).ce
    torch.testing.assert_close(mixed, exact, rtol=2e-2, atol=0)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    half = model.to(torch.bfloat16)(_ids(), _ids().roll(-1, dims=1)).ce
    torch.testing.assert_close(half.float(), exact, rtol=3e-2, atol=0)
