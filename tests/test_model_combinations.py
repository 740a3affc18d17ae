"""Every attention with every router: no position sees the future, and recomputed or compiled, training is the same."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import model.experts
from model.attention_config import LatentConfig, MLAConfig, ReachConfig
from model.block_config import BlockConfig
from model.config import ModelConfig
from model.expert_config import ExpertConfig, RouterConfig
from model.lm import MoELanguageModel

MLA = MLAConfig(q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3)
ATTENTIONS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped, local-global, sinks": {
        "num_kv_heads": 2, "reach": ReachConfig(window=4, global_every=2, head_sinks=True, sink_tokens=1),
    },
    "multi-query, blocks": {"num_kv_heads": 1, "reach": ReachConfig(sparsity="blocks", sparse_block=3)},
    "mla": {"attention": "mla", "mla": MLA},
    "mla, window": {"attention": "mla", "mla": MLA, "reach": ReachConfig(window=5, head_sinks=True)},
    "latent": {"attention": "latent", "latents": LatentConfig(num_latents=3, latent_chunk=4)},
    "gpt-2": {"block": BlockConfig(norm="layer", positions="learned", dense_layer="gelu"), "moe_every": 2},
}  # fmt: skip
CLAMPED = ExpertConfig(expert_activation="clamped", expert_bias=True)
CAUSAL: dict[str, dict[str, Any]] = {
    "softmax": {},
    "not normalised": {"router": RouterConfig(norm_topk=False), "num_shared_experts": 1},
    "sigmoid, groups, bias": {
        "router": RouterConfig(score="sigmoid", selection_bias=True, num_groups=2, scale=1.5),
    },
    "best of a group": {"router": RouterConfig(num_groups=2, group_score="max")},
    "softmax of the chosen": {
        "router": RouterConfig(score="softmax_topk", router_bias=True), "experts": CLAMPED,
    },
    "capacity": {"router": RouterConfig(capacity_factor=0.7)},
    "shazeer": {"router": RouterConfig(router_noise="shazeer", orthogonality=True)},
    "gumbel": {"router": RouterConfig(router_noise="gumbel", balance_scope="sequence")},
    "jitter, experts off": {"router": RouterConfig(router_jitter=0.3, expert_dropout=0.4)},
    "dealt out": {"router": RouterConfig(force_balanced=True)},
    "all experts": {"top_k": 4, "num_shared_experts": 1, "experts": ExpertConfig(shared_expert_gate=True)},
    "one expert": {"num_experts": 1, "top_k": 1},
}  # fmt: skip
NOT_CAUSAL: dict[str, dict[str, Any]] = {
    "capacity by weight": {"router": RouterConfig(capacity_factor=0.5, drop_order="prob")},
    "experts choose": {"router": RouterConfig(chooser="expert", balance_scope="global")},
}
ROUTERS = {**CAUSAL, **NOT_CAUSAL}
PAIRS = list(itertools.product(ATTENTIONS, ROUTERS))
COMPILED: dict[str, dict[str, Any]] = {
    "chance, capacity": {
        "router": RouterConfig(
            score="sigmoid", router_noise="shazeer", router_jitter=0.2, expert_dropout=0.3, capacity_factor=0.8,
            orthogonality=True, balance_scope="sequence",
        ),
    },
    "experts choose": {"router": RouterConfig(chooser="expert", router_noise="gumbel")},
    "softmax of the chosen, capacity by weight": {
        "router": RouterConfig(score="softmax_topk", router_bias=True, capacity_factor=0.7, drop_order="prob"),
        "experts": CLAMPED,
    },
    "dealt out, gate, gpt-2": {
        "router": RouterConfig(force_balanced=True), "num_shared_experts": 1,
        "experts": ExpertConfig(shared_expert_gate=True), "block": ATTENTIONS["gpt-2"]["block"],
    },
}  # fmt: skip
"""Between them, what no other test of compiling has; a config is compiled in seconds, so several things at once."""


def _model(attention: dict[str, Any], router: dict[str, Any], num_layers: int = 2) -> MoELanguageModel:
    torch.manual_seed(4)
    shape = {"vocab_size": 37, "dim": 16, "num_layers": num_layers, "num_heads": 4, "max_seq_len": 16}
    shape |= {"num_experts": 4, "expert_dim": 6, "init_std": 0.3}
    model = MoELanguageModel(ModelConfig(**{**shape, **attention, **router})).train()
    for name, value in (*model.named_buffers(), *model.named_parameters()):
        if "bias" in name:
            torch.nn.init.normal_(value, std=0.1)
    return model


def _ids(length: int = 13) -> Tensor:
    return torch.randint(37, (2, length), generator=torch.Generator().manual_seed(7))


def _again(model: MoELanguageModel) -> None:
    """The next pass draws what the last one drew."""
    if model.model.draws is not None:
        model.model.draws.passes = 0


def _row_by_row(x_NI: Tensor, weights_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """The grouped product with the same rounding for a row whoever its neighbours are."""
    experts_N = torch.searchsorted(ends_E, torch.arange(len(x_NI)), right=True).clamp_max(
        len(weights_EOI) - 1
    )
    return torch.stack([weights_EOI[expert] @ row for row, expert in zip(x_NI, experts_N, strict=True)])


@pytest.mark.parametrize(("attention", "router"), PAIRS)
def test_what_is_called_causal_is_so_to_the_bit(
    attention: str, router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, where noise, capacity and switched-off experts are at work."""
    monkeypatch.setattr(model.experts, "grouped_mm", _row_by_row)
    lm = _model(ATTENTIONS[attention], ROUTERS[router])
    assert lm.config.is_causal() is (router in CAUSAL)
    logits = []
    ids_BS = _ids()
    for shift in (0, 1):
        _again(lm)
        changed_BS = torch.cat((ids_BS[:, :8], (ids_BS[:, 8:] + shift) % 37), dim=1)
        with torch.no_grad():
            logits.append(lm(changed_BS).logits_BSV)
    assert torch.equal(logits[0][:, :8], logits[1][:, :8]) is (router in CAUSAL)
    assert not torch.allclose(logits[0][:, 8:], logits[1][:, 8:])


class Trained(NamedTuple):
    loss: Tensor
    counts_LE: Tensor
    grads: dict[str, Tensor]


def _train(lm: Any) -> Trained:
    lm.zero_grad()
    out = lm(_ids(), _ids().roll(-1, dims=1))
    loss = out.ce + sum(value.sum() for value in out.aux.values())
    loss.backward()
    grads = {
        name.removeprefix("_orig_mod."): weight.grad.clone()
        for name, weight in lm.named_parameters()
        if weight.grad is not None
    }
    return Trained(loss.detach(), out.expert_counts_LE, grads)


@pytest.mark.parametrize(("attention", "router"), PAIRS)
def test_recomputing_changes_no_bit(attention: str, router: str) -> None:
    lm = _model(ATTENTIONS[attention], ROUTERS[router])
    kept = _train(lm)
    _again(lm)
    lm.gradient_checkpointing_enable()
    again = _train(lm)
    assert torch.equal(kept.loss, again.loss)
    assert torch.equal(kept.counts_LE, again.counts_LE)
    assert kept.grads.keys() == again.grads.keys()
    assert [name for name, grad in kept.grads.items() if not torch.equal(grad, again.grads[name])] == []


def _compiled(lm: MoELanguageModel, **options: Any) -> Trained:
    torch._dynamo.reset()
    _again(lm)
    return _train(torch.compile(lm, dynamic=False, **options))


def _assert_close(eager: Trained, compiled: Trained) -> None:
    torch.testing.assert_close(compiled.loss, eager.loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(compiled.counts_LE, eager.counts_LE)
    torch.testing.assert_close(compiled.grads, eager.grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", COMPILED)
def test_compiling_changes_nothing_but_rounding(name: str) -> None:
    """One graph, but for the draws, which are made outside of it."""
    lm = _model({}, COMPILED[name], num_layers=1)
    eager = _train(lm)
    _assert_close(eager, _compiled(lm, backend="aot_eager", fullgraph=lm.model.draws is None))


@pytest.mark.slow
def test_what_the_default_compiler_makes_computes_the_same() -> None:
    """Generated C++ without vector instructions, which takes half the time to build."""
    import torch._inductor.config as inductor

    lm = _model({"num_kv_heads": 2}, CAUSAL["sigmoid, groups, bias"], num_layers=1)
    eager = _train(lm)
    with inductor.patch(
        {"cpp.simdlen": 1}
    ):  # monkeypatch would delete the setting in the end, not give it back
        _assert_close(eager, _compiled(lm, fullgraph=True))
