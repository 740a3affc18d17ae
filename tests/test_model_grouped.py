"""The grouped product equals one product per expert, whatever the back end and however uneven the groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.grouped import _grouped_mm_loop, grouped_mm

SIZES = {
    "even": [3, 3, 3, 3],
    "ragged": [1, 0, 7, 4],
    "empty ends": [0, 5, 6, 0],
    "one gets everything": [0, 0, 11, 0],
    "no rows": [0, 0, 0],
    "one expert": [9],
    "many": [index % 3 for index in range(64)],
}


def _operands(sizes: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_NI = torch.randn(sum(sizes), 8, generator=generator, dtype=dtype, requires_grad=True)
    weights_EOI = torch.randn(len(sizes), 16, 8, generator=generator, dtype=dtype, requires_grad=True)
    return x_NI, weights_EOI, torch.tensor(sizes).cumsum(0).to(torch.int32)


def _naive(x_NI: Tensor, weights_EOI: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat(
        [rows @ weight.t() for rows, weight in zip(x_NI.split(sizes), weights_EOI.unbind(0), strict=True)]
    )


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("back_end", [grouped_mm, _grouped_mm_loop], ids=["chosen", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_values_and_gradients_equal_one_product_per_expert(name: str, back_end, dtype: torch.dtype) -> None:
    sizes = SIZES[name]
    x_NI, weights_EOI, ends_E = _operands(sizes, dtype)
    expected = _naive(x_NI, weights_EOI, sizes)
    actual = back_end(x_NI, weights_EOI, ends_E)
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(actual.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    for ours, theirs in zip(
        torch.autograd.grad(actual, (x_NI, weights_EOI), upstream),
        torch.autograd.grad(expected, (x_NI, weights_EOI), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=2 * tolerance)


def test_gradcheck() -> None:
    x_NI, weights_EOI, ends_E = _operands([2, 0, 3], torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: grouped_mm(x, w, ends_E), (x_NI, weights_EOI))


def test_the_loop_accepts_an_expanded_gradient() -> None:
    x_NI, weights_EOI, ends_E = _operands([2, 1], torch.float32)
    _grouped_mm_loop(x_NI, weights_EOI, ends_E).sum().backward()
    torch.testing.assert_close(weights_EOI.grad[1], x_NI[2].detach().expand(16, 8))


def test_an_expert_without_rows_gets_a_gradient_of_zero() -> None:
    x_NI, weights_EOI, ends_E = _operands([2, 0, 3], torch.float32)
    for back_end in (grouped_mm, _grouped_mm_loop):
        weights_EOI.grad = None
        back_end(x_NI, weights_EOI, ends_E).square().sum().backward()
        assert torch.equal(weights_EOI.grad[1], torch.zeros(16, 8))
        assert bool(weights_EOI.grad[0].any())


def test_the_custom_op_keeps_torch_s_rules() -> None:
    torch.library.opcheck(_grouped_mm_loop, _operands([2, 0, 3], torch.float32))
