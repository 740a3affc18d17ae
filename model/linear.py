"""x W^T as a layer, by the faster of torch's two libraries.

In float32 torch multiplies by MKL, whose kernels stop at AVX2 on processors of other makers. oneDNN's do not: with
AVX-512 on an AMD EPYC it is 1.2 to 1.5 times as fast for the products of x and of its gradient, of many rows. The
gradient of a weight stays with MKL, for oneDNN would copy both factors first.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.precision import at_least_float32, matmul_dtype

_MANY = 256
"""Rows from which oneDNN is faster: it packs the weight anew in every call."""

_SMALL = 1 << 18
"""Numbers of a matrix up to which `row_times` multiplies and sums: 1 MB."""


@functools.cache
def _has_onednn() -> bool:
    """Whether this build and processor have what pays."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_pays(x: Tensor, weight_OI: Tensor) -> bool:
    """Whether `rows_times` is the faster way, and possible."""
    many = x.numel() >= _MANY * x.shape[-1]
    plain = x.device.type == "cpu" and x.dtype == weight_OI.dtype == torch.float32
    return many and plain and not torch.compiler.is_compiling() and _has_onednn()


def rows_times(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T by oneDNN, without gradients. The weight may be transposed."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, None, "none", [], "")
    return product


def row_times(x_1I: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T of one row, without gradients.

    MKL reads several short rows of a matrix at a time, which no prefetching follows: 8 GB/s where the matrix is in the
    last cache. Multiplied and summed in two passes it takes two thirds to four fifths of that time, as long as the
    second pass finds it in the second cache.
    """
    if x_1I.dtype == torch.float32 and weight_OI.numel() <= _SMALL:
        return (weight_OI * x_1I).sum(-1, keepdim=True).t()
    return F.linear(x_1I, weight_OI)


def rows_by(x_KI: Tensor, weights_KOI: Tensor) -> Tensor:
    """Each row by a matrix of its own, [K, O], or one row by all of them: a compiler makes it one pass over them."""
    dtype, (rows, width) = x_KI.dtype, x_KI.shape
    # `as_strided` makes the compiler finish x first, instead of computing its norm anew for every number of the result.
    x_KI = at_least_float32(x_KI).as_strided((rows, 1, width), (width, width, 1))
    return (at_least_float32(weights_KOI) * x_KI).sum(-1).to(dtype)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear`; in a compiled step of one row on a CPU in one pass over the weight, fused with what follows."""
    one_row = torch.compiler.is_compiling() and x.numel() == x.shape[-1] and x.device.type == "cpu"
    if not one_row or torch.is_grad_enabled() or not (matmul_dtype(x) == x.dtype == weight_OI.dtype):
        return F.linear(x, weight_OI, bias_O)
    y = rows_by(x.reshape(1, -1), weight_OI[None]).view(*x.shape[:-1], -1)
    return y if bias_O is None else y + bias_O


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return rows_times(x, weight_OI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        grad_x = rows_times(grad, weight_OI.t()) if ctx.needs_input_grad[0] else None
        grad_weight_OI = None
        if ctx.needs_input_grad[1]:
            grad_weight_OI = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        return grad_x, grad_weight_OI


class Linear(nn.Linear):
    """`nn.Linear`, faster where it can be."""

    def forward(self, x: Tensor) -> Tensor:
        if matmul_dtype(x) != x.dtype or not onednn_pays(x, self.weight):
            return linear(x, self.weight, self.bias)
        y = _Product.apply(x, self.weight)
        return y if self.bias is None else y + self.bias
