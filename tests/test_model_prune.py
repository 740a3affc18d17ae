"""Pruning what no token uses and doubling everything compute the same; training goes on with its own state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.expert_config import ExpertConfig, RouterConfig
from model.lm import MoELanguageModel
from model.prune import carry_optimizer_state, least_used_removed, most_used_doubled, with_experts

VOCAB = 23
IDLE = (1, 4)


def _model(**router: Any) -> MoELanguageModel:
    config = ModelConfig(
        vocab_size=VOCAB,
        dim=16,
        num_layers=3,
        first_dense_layers=1,
        num_heads=2,
        num_experts=6,
        top_k=2,
        expert_dim=8,
        router=RouterConfig(router_bias=True, **router),
        experts=ExpertConfig(expert_bias=True),
    )
    torch.manual_seed(0)
    model = MoELanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def _with_idle_experts(**router: Any) -> MoELanguageModel:
    model = _model(**router)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.mlp.gate.bias[list(IDLE)] = -1e4
    return model


def _ids() -> Tensor:
    return torch.randint(VOCAB, (3, 14), generator=torch.Generator().manual_seed(1))


def _named(model: MoELanguageModel) -> dict[str, torch.nn.Parameter]:
    return dict(model.named_parameters())


def _step(model: MoELanguageModel, optimizer: torch.optim.Optimizer) -> None:
    output = model(_ids(), _ids().roll(-1, 1))
    assert output.ce is not None
    output.ce.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    "router", [{}, {"score": "sigmoid", "selection_bias": True}, {"score": "softmax_topk"}], ids=str
)
def test_experts_that_no_token_uses_go_without_a_trace(router: dict[str, Any]) -> None:
    model = _with_idle_experts(**router)
    before = model(_ids())
    sources = least_used_removed(before.expert_counts_LE, 4)
    assert sources == [[0, 2, 3, 5]] * 2
    pruned = with_experts(model, sources)
    assert pruned.config == replace(model.config, num_experts=4)
    after = pruned(_ids())
    torch.testing.assert_close(after.logits_BSV, before.logits_BSV)
    assert torch.equal(after.expert_counts_LE, before.expert_counts_LE[:, [0, 2, 3, 5]])
    assert model.config.num_experts == 6


def test_training_goes_on_after_pruning_as_if_nothing_had_happened() -> None:
    whole = _with_idle_experts()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        _step(whole, optimizer)
    sources = [[5, 0, 2, 3]] * 2
    pruned = with_experts(whole, sources)
    fresh = torch.optim.AdamW(pruned.parameters(), lr=1e-2, weight_decay=0.0)
    carry_optimizer_state(whole, sources, (_named(whole), optimizer), (_named(pruned), fresh))
    for _ in range(3):
        _step(whole, optimizer)
        _step(pruned, fresh)
    torch.testing.assert_close(pruned(_ids()).logits_BSV, whole(_ids()).logits_BSV)


def test_without_its_state_it_would_go_elsewhere() -> None:
    whole = _with_idle_experts()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        _step(whole, optimizer)
    pruned = with_experts(whole, [[0, 2, 3, 5]] * 2)
    fresh = torch.optim.AdamW(pruned.parameters(), lr=1e-2, weight_decay=0.0)
    _step(whole, optimizer)
    _step(pruned, fresh)
    assert not torch.allclose(pruned(_ids()).logits_BSV, whole(_ids()).logits_BSV, rtol=1e-3, atol=1e-3)


def test_every_expert_doubled_with_twice_the_choices_is_the_same_model() -> None:
    model = _model()
    grown = with_experts(model, [[*range(6), *range(6)]] * 2, top_k=4)
    torch.testing.assert_close(grown(_ids()).logits_BSV, model(_ids()).logits_BSV)


def test_growth_copies_the_busiest_and_noise_moves_only_the_copies() -> None:
    model = _model(selection_bias=True)
    counts_LE = torch.tensor([[9, 1, 2, 8, 3, 4], [1, 2, 3, 4, 5, 6]])
    sources = most_used_doubled(counts_LE, 8)
    assert sources == [[0, 1, 2, 3, 4, 5, 0, 3], [0, 1, 2, 3, 4, 5, 5, 4]]
    grown = with_experts(model, sources, router_noise=0.1)
    for layer, row in zip((1, 2), sources, strict=True):
        old, new = model.model.layers[layer].mlp, grown.model.layers[layer].mlp
        assert torch.equal(new.experts.gate_up_proj, old.experts.gate_up_proj[row])
        assert torch.equal(new.experts.down_proj_bias, old.experts.down_proj_bias[row])
        assert torch.equal(new.gate.weight[:6], old.gate.weight)
        moved = (new.gate.weight[6:] - old.gate.weight[row[6:]]).std() / old.gate.weight.std()
        assert 0.05 < float(moved) < 0.2


def test_refusals() -> None:
    model, counts_LE = _model(), torch.ones(2, 6)
    with pytest.raises(ValueError, match="num_experts=6 is not between 1 and 5"):
        least_used_removed(counts_LE, 6)
    with pytest.raises(ValueError, match="num_experts=13 is not between 7 and 12"):
        most_used_doubled(counts_LE, 13)
    with pytest.raises(ValueError, match="sources has 1 rows for 2 MoE layers"):
        with_experts(model, [[0, 1]])
    with pytest.raises(ValueError, match=r"lengths \[2, 3\]"):
        with_experts(model, [[0, 1], [0, 1, 2]])
    with pytest.raises(ValueError, match="names expert 6, but there are 6"):
        with_experts(model, [[0, 6], [0, 1]])
    with pytest.raises(ValueError, match="top_k=2 exceeds num_experts=1"):
        with_experts(model, [[0], [1]])
    assert with_experts(model, [[0], [1]], top_k=1).config.num_experts == 1
