"""RMSNorm against torch's own, which spells the formula out on a CPU: values and both gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.norm import RMSNorm

SHAPES = ((1, 1, 8), (3, 5, 24), (2, 700, 64), (7, 16))


def norm_of(width: int, eps: float = 1e-5) -> RMSNorm:
    norm = RMSNorm(width, eps)
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.5)
    return norm


def results(norm: RMSNorm, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    y = norm(x)
    return (y.detach(), *torch.autograd.grad(y, (x, norm.weight), grad))


def expected(norm: RMSNorm, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x, weight = x.double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    y = F.rms_norm(x, weight.shape, weight, norm.eps)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), grad.double()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)]
)
def test_values_and_gradients_are_those_of_the_formula(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    norm = norm_of(shape[-1]).to(dtype)
    # Far from mean 0, so that a LayerNorm would be wrong; one row is all zeros.
    x = (torch.randn(shape) * 3 + 2).to(dtype)
    x.view(-1, shape[-1])[0] = 0
    grad = torch.randn(shape).to(dtype)
    for got, want in zip(results(norm, x, grad), expected(norm, x, grad), strict=True):
        assert got.dtype == dtype
        assert float((got.double() - want).norm() / want.norm().clamp_min(1e-9)) < tolerance


def test_gradients_in_float64_agree_with_differences() -> None:
    torch.manual_seed(1)
    norm = norm_of(6).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, (x,)),
        (x, norm.weight),
    )


def test_with_and_without_gradients_it_says_the_same() -> None:
    torch.manual_seed(2)
    norm = norm_of(256)
    for tokens in (1, 2, 400):
        x = torch.randn(tokens, 256)
        with torch.no_grad():
            without = norm(x)
        torch.testing.assert_close(norm(x).detach(), without, rtol=1e-6, atol=1e-6)


def test_strided_input_and_gradient() -> None:
    torch.manual_seed(3)
    norm = norm_of(12)
    x = torch.randn(4, 12, 6).transpose(1, 2)
    grad = torch.randn(12, 6, 4).permute(2, 1, 0)
    for got, want in zip(results(norm, x, grad), expected(norm, x, grad), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_compiled_it_is_the_same_formula() -> None:
    torch.manual_seed(4)
    norm, x = norm_of(16), torch.randn(5, 16)
    compiled = torch.compile(copy.deepcopy(norm), backend="aot_eager", fullgraph=True)
    for got, want in zip(
        results(compiled, x, torch.ones(5, 16)), results(norm, x, torch.ones(5, 16)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
