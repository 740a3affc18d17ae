"""Products by either library are the same product, in values and in gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import model.linear
from model.linear import Linear, onednn_pays, row_times

ROWS, INTO, OUT_OF = 3, 20, 12


@pytest.fixture(params=["onednn", "torch"])
def layer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Linear:
    """A layer of each way; the first where torch was built with it, on any processor."""
    if request.param == "onednn":
        if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            pytest.skip("this torch has no oneDNN")
        monkeypatch.setattr(model.linear, "_MANY", 1)
        monkeypatch.setattr(model.linear, "_has_onednn", lambda: True)
    else:
        monkeypatch.setattr(model.linear, "_has_onednn", lambda: False)
    torch.manual_seed(0)
    made = Linear(INTO, OUT_OF)
    assert onednn_pays(torch.ones(2 * ROWS, INTO), made.weight) == (request.param == "onednn")
    return made


@pytest.mark.parametrize("shape", [(ROWS, INTO), (2, ROWS, INTO)], ids=str)
def test_values_and_gradients_are_those_of_the_formula(layer: Linear, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(*shape[:-1], OUT_OF)
    wide = [each.detach().double().requires_grad_() for each in (x, layer.weight, layer.bias)]
    expected = wide[0] @ wide[1].t() + wide[2]
    ours = torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), grad)
    theirs = torch.autograd.grad(expected, wide, grad.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5)


def test_only_the_gradients_that_are_wanted_come(layer: Linear) -> None:
    x = torch.randn(ROWS, INTO)
    layer.weight.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


def test_rows_that_are_not_contiguous_are_read_in_their_order(layer: Linear) -> None:
    x = torch.randn(INTO, ROWS).t()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_autocast_decides_the_dtype(layer: Linear) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(ROWS, INTO)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limit", [0, INTO * OUT_OF], ids=["large", "small"])
def test_one_row_is_the_same_product(dtype: torch.dtype, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.linear, "_SMALL", limit)
    x_1I, weight_OI = torch.randn(1, INTO).to(dtype), torch.randn(OUT_OF, INTO).to(dtype)
    assert row_times(x_1I, weight_OI).shape == (1, OUT_OF)
    torch.testing.assert_close(row_times(x_1I, weight_OI), F.linear(x_1I, weight_OI))
