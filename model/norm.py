"""Root-mean-square normalisation (Zhang & Sennrich 2019): no mean, no bias, statistics in float32.

torch has a fused kernel for CUDA only; on a CPU its backward is a dozen passes over the activations, together
seven times a LayerNorm's. LayerNorm's own backward kernel does the same work but for one term, so it is used here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.config import ModelConfig
from model.precision import at_least_float32, no_autocast

_FEW = 1 << 14
"""Numbers below which torch's own forward is as fast: a token or two."""


class _RMSNormCPU(torch.autograd.Function):
    """x * r * weight with r = (mean(x^2) + eps)^-1/2.

    With g' = grad * weight and n = x * r the gradient of x is r * (g' - n * mean(g' * n)). LayerNorm's kernel, told
    that the mean of x is 0, returns r * (g' - mean(g') - n * mean(g' * n)); its weight's gradient is this one's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_TD = at_least_float32(x.reshape(-1, x.shape[-1]))
        norms_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
        scale_T1 = norms_T1.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale_T1)
        return (x_TD * scale_T1).mul_(weight_D).to(x.dtype).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, scale_T1 = ctx.saved_tensors
        width = x.shape[-1]
        x_TD, grad_TD = at_least_float32(x.reshape(-1, width)), at_least_float32(grad.reshape(-1, width))
        wide_D = weight_D.to(x_TD.dtype)
        grad_x_TD, grad_weight_D, _ = torch.ops.aten.native_layer_norm_backward(
            grad_TD, x_TD, [width], torch.zeros_like(scale_T1), scale_T1, wide_D, None, [True, True, False]
        )
        with no_autocast(grad_TD):
            means_T = grad_TD @ wide_D / width
        grad_x_TD.addcmul_(means_T[:, None], scale_T1)
        return grad_x_TD.to(x.dtype).view_as(x), grad_weight_D.to(weight_D.dtype), None


def _is_plain(x: Tensor) -> bool:
    """Whether a number may be read from `x` at no cost."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32
    return plain and not (torch.is_grad_enabled() or torch.compiler.is_compiling())


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight_D = self.weight.to(x.dtype)
        if x.numel() == len(weight_D) and _is_plain(x):  # a token: five small operations less
            x_D = x.flatten()
            return x * (weight_D * (float(x_D.dot(x_D)) / len(weight_D) + self.eps) ** -0.5)
        many = torch.is_grad_enabled() or x.numel() > _FEW
        if many and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _RMSNormCPU.apply(x, weight_D, self.eps)
        return F.rms_norm(x, self.weight.shape, weight_D, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def build_norm(config: ModelConfig) -> nn.Module:
    """The norm in front of a sublayer, or behind the last one."""
    kind = nn.LayerNorm if config.block.norm == "layer" else RMSNorm
    return kind(config.dim, config.norm_eps)
