"""The product of MoE layers: rows sorted by expert, each block of rows times the matrix of its expert.

Two back ends, chosen per call. `F.grouped_mm` takes bfloat16 anywhere and float32 outside of compilation.
Everything else (float32 under torch.compile, float64, widths that its kernel cannot align) runs in one
op of our own, a loop of products into slices of one result: opaque to the compiler, and linear in the
number of experts. Writing `weights[e]` in a loop under autograd is not: each expert's backward would
allocate the gradient of all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_mm(x_NI: Tensor, weights_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Rows of expert e, `x_NI[ends_E[e-1]:ends_E[e]]`, times `weights_EOI[e]` transposed.

    Args:
        x_NI: N rows of width I, sorted by expert.
        weights_EOI: one [O, I] matrix for each of E experts, same dtype as `x_NI`.
        ends_E: int32. Row after the last one of each expert, not falling, the last one N.

    Returns:
        [N, O]. Its gradient must be dense: torch's kernel refuses the strides of 0 that `.sum()` sends back.
    """
    if _takes_native(x_NI, weights_EOI):
        return F.grouped_mm(x_NI, weights_EOI.transpose(-2, -1), offs=ends_E)
    return _grouped_mm_loop(x_NI, weights_EOI, ends_E)


def _takes_native(x_NI: Tensor, weights_EOI: Tensor) -> bool:
    """Whether torch's kernel accepts these operands (torch 2.11 to 2.13)."""
    on_cpu = x_NI.device.type == "cpu"
    if x_NI.dtype == torch.float32:
        # Its shape function knows bfloat16 only, so compilers cannot trace it; on CUDA it is a loop as well.
        supported = on_cpu and not torch.compiler.is_compiling()
    else:
        supported = x_NI.dtype == torch.bfloat16
    # Rows of operands and results must start at multiples of 16 bytes.
    aligned = all(width * x_NI.element_size() % 16 == 0 for width in weights_EOI.shape[1:])
    return supported and aligned and (on_cpu or torch.cuda.get_device_capability(x_NI.device) >= (8, 0))


@torch.library.custom_op("moe_model::grouped_mm", mutates_args=())
def _grouped_mm_loop(x_NI: Tensor, weights_EOI: Tensor, ends_E: Tensor) -> Tensor:
    y_NO = x_NI.new_empty(x_NI.shape[0], weights_EOI.shape[1])
    start = 0
    for weight_OI, end in zip(weights_EOI.unbind(0), ends_E.tolist(), strict=True):
        torch.mm(x_NI[start:end], weight_OI.t(), out=y_NO[start:end])
        start = end
    return y_NO


@torch.library.custom_op("moe_model::grouped_mm_backward", mutates_args=())
def _grouped_mm_backward(
    grad_NO: Tensor, x_NI: Tensor, weights_EOI: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    grad_x_NI, grad_weights_EOI = torch.empty_like(x_NI), torch.empty_like(weights_EOI)
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        rows_NO, rows_NI = grad_NO[start:end], x_NI[start:end]
        torch.mm(rows_NO, weights_EOI[expert], out=grad_x_NI[start:end])
        torch.mm(rows_NO.t(), rows_NI, out=grad_weights_EOI[expert])  # zeros for an expert without rows
        start = end
    return grad_x_NI, grad_weights_EOI


@_grouped_mm_loop.register_fake
def _(x_NI: Tensor, weights_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], weights_EOI.shape[1])


@_grouped_mm_backward.register_fake
def _(grad_NO: Tensor, x_NI: Tensor, weights_EOI: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_NI), torch.empty_like(weights_EOI)


def _save_operands(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_grouped_mm_backward(grad_NO, *ctx.saved_tensors), None


_grouped_mm_loop.register_autograd(_backward, setup_context=_save_operands)
