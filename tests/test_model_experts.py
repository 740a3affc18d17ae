"""The experts of a layer equal the textbook sum over each token's experts, in values and in all gradients."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model.experts
from model.config import ModelConfig
from model.expert_config import ExpertConfig
from model.experts import GroupedExperts, count_experts, dispatch, row_multiple, rows_of

CASES = {
    "E4 K2": (4, 2),
    "K = E": (3, 3),
    "E = 1": (1, 1),
    "E64 K8": (64, 8),
    "E64 K1": (64, 1),
}


CLAMPED = ExpertConfig(expert_activation="clamped", expert_bias=True, swiglu_limit=0.5)
UNGATED = ExpertConfig(expert_activation="gelu", expert_bias=True)
KINDS = {
    "swiglu": ExpertConfig(),
    "bias": ExpertConfig(expert_bias=True),
    "clamped": CLAMPED,
    "gelu": UNGATED,
}


def _experts(
    num_experts: int, top_k: int, dtype: torch.dtype = torch.float64, kind: ExpertConfig | None = None
) -> GroupedExperts:
    config = ModelConfig(
        dim=8,
        num_heads=4,
        num_experts=num_experts,
        top_k=top_k,
        expert_dim=6,
        experts=kind or ExpertConfig(),
    )
    experts = GroupedExperts(config).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return experts.to(dtype)


def _routing(tokens: int, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids_TK = torch.rand(tokens, num_experts, generator=generator).argsort(dim=-1)[:, :top_k]
    return ids_TK, torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)


def _inner(kind: ExpertConfig, hidden: Tensor) -> Tensor:
    if kind == UNGATED:
        cubic_F = (2 / math.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)
        return hidden * (1 + cubic_F.tanh()) / 2
    gate_F, up_F = hidden.chunk(2)
    if kind == CLAMPED:
        gate_F, up_F = gate_F.clamp(max=0.5), up_F.clamp(-0.5, 0.5)
        return gate_F * torch.sigmoid(1.702 * gate_F) * (up_F + 1)
    return F.silu(gate_F) * up_F


def _textbook(experts: GroupedExperts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    rows = []
    for x_D, ids_K, weights_K in zip(x_TD, ids_TK.tolist(), weights_TK, strict=True):
        total = torch.zeros_like(x_D)
        for expert, weight in zip(ids_K, weights_K, strict=True):
            hidden = experts.gate_up_proj[expert] @ x_D
            if experts.gate_up_proj_bias is not None:
                hidden = hidden + experts.gate_up_proj_bias[expert]
            y_D = experts.down_proj[expert] @ _inner(experts.config, hidden)
            if experts.down_proj_bias is not None:
                y_D = y_D + experts.down_proj_bias[expert]
            total = total + weight * y_D
        rows.append(total)
    return torch.stack(rows)


def _compare(experts: GroupedExperts, ids_TK: Tensor, weights_TK: Tensor) -> None:
    x_TD = torch.randn(len(ids_TK), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    leaves = [x_TD.requires_grad_(), weights_TK.requires_grad_(), *experts.parameters()]
    actual, expected = experts(x_TD, ids_TK, weights_TK), _textbook(experts, x_TD, ids_TK, weights_TK)
    torch.testing.assert_close(actual, expected)
    upstream = torch.sin(torch.arange(actual.numel(), dtype=torch.float64)).view_as(actual)
    for ours, theirs in zip(
        torch.autograd.grad(actual, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("case", CASES)
def test_experts_equal_the_textbook_sum(case: str, kind: ExpertConfig) -> None:
    num_experts, top_k = CASES[case]
    _compare(_experts(num_experts, top_k, kind=kind), *_routing(7, num_experts, top_k))


@pytest.mark.parametrize("ends", [[2, 2, 5], [0, 0, 4], [3, 3, 3], [1, 2, 3]], ids=str)
def test_each_row_gets_the_values_of_its_expert(ends: list[int]) -> None:
    values_EX = torch.arange(6.0).view(3, 2)
    rows_NX = rows_of(values_EX, torch.tensor(ends, dtype=torch.int32), ends[-1])
    expected = [next(e for e, end in enumerate(ends) if row < end) for row in range(ends[-1])]
    assert torch.equal(rows_NX, values_EX[expected])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("case", CASES)
def test_rows_that_fill_up_change_nothing(
    case: str, kind: ExpertConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.experts, "row_multiple", lambda *_: 4)
    num_experts, top_k = CASES[case]
    _compare(_experts(num_experts, top_k, kind=kind), *_routing(7, num_experts, top_k))


def test_only_bfloat16_on_a_cpu_is_filled_up_and_by_little() -> None:
    x_TD = torch.ones(1, 8, dtype=torch.bfloat16)
    assert row_multiple(x_TD.float(), 4096, 8) == row_multiple(x_TD.to("meta"), 4096, 8) == 1
    assert row_multiple(x_TD, 100, 8) == 1
    for mean in (40, 64, 512, 2048):
        multiple = row_multiple(x_TD, 8 * mean, 8)
        assert 16 <= multiple <= mean / 2
        assert multiple.bit_count() == 1


def test_filled_up_experts_in_bfloat16_stay_near_float64() -> None:
    exact, rounded = _experts(4, 2), _experts(4, 2, torch.bfloat16)
    ids_TK, weights_TK = _routing(100, 4, 2)
    x_TD = torch.randn(100, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert row_multiple(x_TD.bfloat16(), ids_TK.numel(), 4) > 1
    leaves, wide = x_TD.bfloat16().requires_grad_(), x_TD.clone().requires_grad_()
    actual, expected = rounded(leaves, ids_TK, weights_TK.float()), exact(wide, ids_TK, weights_TK)
    torch.testing.assert_close(actual.double(), expected, rtol=5e-2, atol=5e-2)
    grads = torch.autograd.grad(actual.float().sin().sum(), [leaves, *rounded.parameters()])
    wanted = torch.autograd.grad(expected.sin().sum(), [wide, *exact.parameters()])
    for ours, theirs in zip(grads, wanted, strict=True):
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 0.02


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


def test_dispatch_fills_each_expert_up() -> None:
    ids_TK, _ = _routing(20, 5, 2)
    ids_TK = torch.where(ids_TK == 3, 1, ids_TK)  # an expert without rows stays one
    order_N, inverse_N, ends_E = dispatch(ids_TK, 5, multiple=8)
    counts = [sum(expert == e for row in ids_TK.tolist() for expert in row) for e in range(5)]
    starts = [0, *ends_E.tolist()]
    assert [stop - start for start, stop in pairwise(starts)] == [-(-count // 8) * 8 for count in counts]
    assert counts[3] == 0
    assert len(order_N) == starts[-1]
    plain_N = dispatch(ids_TK, 5).order_N.split(counts)
    for start, slots_N in zip(starts, plain_N, strict=False):
        assert torch.equal(order_N[start : start + len(slots_N)], slots_N)
        assert torch.equal(inverse_N[slots_N], torch.arange(start, start + len(slots_N)))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("num_experts", "top_k"), CASES.values(), ids=CASES)
def test_one_token_without_gradients(num_experts: int, top_k: int, kind: ExpertConfig) -> None:
    """A decoding step goes expert by expert; it must say what the sorted way says."""
    experts = _experts(num_experts, top_k, kind=kind)
    ids_TK, weights_TK = _routing(3, num_experts, top_k)
    x_TD = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected = _textbook(experts, x_TD, ids_TK, weights_TK)
    with torch.no_grad():
        for t in range(3):
            got = experts(x_TD[t : t + 1], ids_TK[t : t + 1], weights_TK[t : t + 1])
            torch.testing.assert_close(got, expected[t : t + 1])
