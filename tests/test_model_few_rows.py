"""Few rows by a compiled program are the grouped product, wherever they come from, and nobody else gets it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.experts import GroupedExperts
from model.few_rows import ROWS, compiling_few_rows, few_rows, few_rows_mm
from model.grouped import grouped_mm

CONFIG = ModelConfig(vocab_size=61, dim=24, num_layers=1, num_heads=2, num_experts=6, top_k=2, expert_dim=40)
BLOCKS = {
    "even": [1, 1, 1],
    "ragged": [2, 0, 1, 3],
    "empty ends": [0, 2, 1, 0],
    "one gets everything": [0, 3, 0],
    "one expert": [2],
    "no rows": [0, 0],
}


@pytest.mark.parametrize("name", BLOCKS)
def test_it_is_the_grouped_product(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    sizes_E = ROWS * torch.tensor(BLOCKS[name])
    x_NI = torch.randn(int(sizes_E.sum()), 24, generator=generator)
    weights_EOI = torch.randn(len(sizes_E), 40, 24, generator=generator)
    ends_E = sizes_E.cumsum(0).to(torch.int32)
    with torch.no_grad():
        torch.testing.assert_close(
            few_rows_mm(x_NI, weights_EOI, ends_E),
            grouped_mm(x_NI, weights_EOI, ends_E),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product that a compiled program did."""
    rows: list[int] = []

    def counting(x_NI: Tensor, weights_EOI: Tensor, ends_E: Tensor) -> Tensor:
        rows.append(len(x_NI))
        return few_rows_mm(x_NI, weights_EOI, ends_E)

    monkeypatch.setattr("model.experts.few_rows_mm", counting)
    return rows


@pytest.mark.parametrize("top_k", [1, 2, 6])
@pytest.mark.parametrize("biased", [False, True])
def test_experts_say_the_same_by_it(top_k: int, biased: bool, counted: list[int]) -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, top_k=top_k, experts=replace(CONFIG.experts, expert_bias=biased))
    experts, tokens = GroupedExperts(config), 9
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x_TD, weights_TK = torch.randn(tokens, 24), torch.rand(tokens, top_k)
    ids_TK = torch.rand(tokens, 6).argsort(dim=-1)[:, :top_k]
    with torch.no_grad():
        plain = experts(x_TD, ids_TK, weights_TK)
        assert not counted
        with compiling_few_rows():
            torch.testing.assert_close(experts(x_TD, ids_TK, weights_TK), plain, rtol=1e-4, atol=1e-4)
    assert len(counted) == 2
    # Each expert's rows are filled up, and no further.
    loads = torch.bincount(ids_TK.flatten(), minlength=6)
    assert counted[0] == sum(-(-load // ROWS) * ROWS for load in loads.tolist())


def test_only_few_rows_without_gradients_in_float32_are_its_business() -> None:
    x_TD = torch.randn(4, 24)
    with torch.no_grad():
        assert not few_rows(x_TD, 8, 6)
        with compiling_few_rows():
            assert few_rows(x_TD, 8, 6)
            assert not few_rows(x_TD.bfloat16(), 8, 6)
            assert not few_rows(x_TD, 6 * 16, 6)
            with torch.enable_grad():
                assert not few_rows(x_TD, 8, 6)
        assert not few_rows(x_TD, 8, 6)
