"""The experts of a layer equal the textbook sum over each token's experts, in values and in all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.experts import GroupedExperts, count_experts, dispatch

CASES = {
    "E4 K2": (4, 2),
    "K = E": (3, 3),
    "E = 1": (1, 1),
    "E64 K8": (64, 8),
    "E64 K1": (64, 1),
}


def _experts(num_experts: int, top_k: int, dtype: torch.dtype = torch.float64) -> GroupedExperts:
    config = ModelConfig(dim=8, num_heads=4, num_experts=num_experts, top_k=top_k, expert_dim=6)
    experts = GroupedExperts(config).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return experts.to(dtype)


def _routing(tokens: int, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids_TK = torch.rand(tokens, num_experts, generator=generator).argsort(dim=-1)[:, :top_k]
    return ids_TK, torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)


def _textbook(experts: GroupedExperts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    rows = []
    for x_D, ids_K, weights_K in zip(x_TD, ids_TK.tolist(), weights_TK, strict=True):
        total = torch.zeros_like(x_D)
        for expert, weight in zip(ids_K, weights_K, strict=True):
            gate_F, up_F = (experts.gate_up_proj[expert] @ x_D).chunk(2)
            total = total + weight * (experts.down_proj[expert] @ (F.silu(gate_F) * up_F))
        rows.append(total)
    return torch.stack(rows)


def _compare(experts: GroupedExperts, ids_TK: Tensor, weights_TK: Tensor) -> None:
    x_TD = torch.randn(len(ids_TK), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    leaves = [x_TD.requires_grad_(), weights_TK.requires_grad_(), experts.gate_up_proj, experts.down_proj]
    actual, expected = experts(x_TD, ids_TK, weights_TK), _textbook(experts, x_TD, ids_TK, weights_TK)
    torch.testing.assert_close(actual, expected)
    upstream = torch.sin(torch.arange(actual.numel(), dtype=torch.float64)).view_as(actual)
    for ours, theirs in zip(
        torch.autograd.grad(actual, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_experts_equal_the_textbook_sum(case: str) -> None:
    num_experts, top_k = CASES[case]
    _compare(_experts(num_experts, top_k), *_routing(7, num_experts, top_k))


def test_one_expert_may_get_every_token_and_others_none() -> None:
    _compare(_experts(5, 1), torch.full((7, 1), 3), torch.linspace(0.1, 1, 7, dtype=torch.float64)[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_stays_near_float64(dtype: torch.dtype) -> None:
    exact, rounded = _experts(4, 2), _experts(4, 2, dtype)
    ids_TK, weights_TK = _routing(9, 4, 2)
    x_TD = torch.randn(9, 8, dtype=torch.float64)
    tolerance = 1e-5 if dtype is torch.float32 else 5e-2
    actual = rounded(x_TD.to(dtype), ids_TK, weights_TK.float())
    assert actual.dtype == dtype
    torch.testing.assert_close(
        actual.double(), exact(x_TD, ids_TK, weights_TK), rtol=tolerance, atol=tolerance
    )


def test_counts_are_those_of_a_dictionary() -> None:
    ids_TK, _ = _routing(50, 6, 2)
    expected = [sum(expert == e for row in ids_TK.tolist() for expert in row) for e in range(6)]
    assert count_experts(ids_TK, 6).tolist() == expected


def test_dispatch_sorts_by_expert_and_keeps_the_order_of_tokens() -> None:
    ids_TK, _ = _routing(20, 5, 2)
    order_N, inverse_N, ends_E = dispatch(ids_TK, 5)
    slots = sorted(range(40), key=lambda slot: (int(ids_TK.flatten()[slot]), slot))
    assert order_N.tolist() == slots
    assert order_N[inverse_N].tolist() == list(range(40))
    starts = [0, *ends_E.tolist()]
    for expert in range(5):
        rows = order_N[starts[expert] : starts[expert + 1]]
        assert set(ids_TK.flatten()[rows].tolist()) <= {expert}
