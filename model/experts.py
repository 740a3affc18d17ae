"""The routed experts of a layer: E SwiGLU networks (Shazeer 2020), or ungated ones, stored as two stacked matrices.

Tokens are sorted by expert, so that each expert multiplies one contiguous block of rows (grouped.py), and
un-sorted by the inverse permutation. Both moves are gathers in both directions: no atomics, and the same
bits in every run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.config import ModelConfig
from model.expert_config import ExpertConfig
from model.few_rows import ROWS, few_rows, few_rows_mm
from model.grouped import grouped_mm
from model.linear import row_times, rows_by
from model.precision import matmul_dtype

_FEWEST = 16
"""Rows that an expert's are filled up to a multiple of, at least."""


class Dispatch(NamedTuple):
    """Which row goes to which expert: N rows, sorted by expert, earlier tokens first.

    N is T * K, or more where each expert's rows are filled up: with slot 0, whose result is not read there.
    """

    order_N: Tensor
    """Slot (token * K + k) that stands at each sorted row."""
    inverse_N: Tensor
    """Sorted row of each slot."""
    ends_E: Tensor
    """int32. Row after the last one of each expert."""


def count_experts(expert_ids: Tensor, num_experts: int) -> Tensor:
    """int64 [E]. How often each expert was chosen; a fixed shape, as compilers need."""
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_ids.device)
    slots_N = expert_ids.reshape(-1)
    return counts_E.scatter_add_(0, slots_N, torch.ones_like(slots_N))


def dispatch(expert_ids_TK: Tensor, num_experts: int, multiple: int = 1) -> Dispatch:
    """Sort the slots of a routing by expert; each expert's rows are filled up to a `multiple`."""
    slots_N = expert_ids_TK.reshape(-1)
    order_N = slots_N.argsort(stable=True)
    rows_N = torch.arange(order_N.numel(), device=order_N.device)
    counts_E = count_experts(slots_N, num_experts)
    ends_E = counts_E.cumsum(0)
    if multiple > 1:
        filled_E = (counts_E + multiple - 1) // multiple * multiple
        starts_E, ends_E = ends_E - counts_E, filled_E.cumsum(0)
        rows_N += (ends_E - filled_E - starts_E)[slots_N[order_N]]
    inverse_N = torch.empty_like(order_N).scatter_(0, order_N, rows_N)
    if multiple > 1:
        order_N = order_N.new_zeros(int(ends_E[-1])).scatter_(0, rows_N, order_N)
    return Dispatch(order_N, inverse_N, ends_E.to(torch.int32))


def row_multiple(x: Tensor, num_rows: int, num_experts: int) -> int:
    """What an expert's rows are worth being filled up to.

    oneDNN, which multiplies bfloat16 on a CPU, compiles a kernel for every number of rows that is new to it. That takes
    as long as the product, for six products of every expert and step: loads seldom come again. Multiples do, and it
    keeps the last 1,024 kernels. About 3 % of the rows are then for nothing.
    """
    mean = num_rows // num_experts
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or mean < 2 * _FEWEST:
        return 1
    return max(_FEWEST, 1 << (mean // 16).bit_length() - 1)


class _ToExperts(torch.autograd.Function):
    """Copy each token to the rows of its K experts; backward sums its K gradients."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.num_tokens = x_TD.shape[0]
        return x_TD.index_select(0, order_N // (inverse_N.numel() // x_TD.shape[0]))

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return F.embedding_bag(inverse_N.view(ctx.num_tokens, -1), grad_ND, mode="sum"), None, None


class _ToTokens(torch.autograd.Function):
    """Sum each token's K rows with its gate weights.

    `embedding_bag` is a gather, a product and a sum in one pass: 20 times as fast here as the three of them.
    """

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weights_TK: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(y_ND, weights_TK, order_N, inverse_N)
        rows_TK = inverse_N.view_as(weights_TK)
        return F.embedding_bag(rows_TK, y_ND, mode="sum", per_sample_weights=weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_ND, weights_TK, order_N, inverse_N = ctx.saved_tensors
        grad_ND = grad_TD.index_select(0, order_N // weights_TK.shape[1])
        grad_weights_N = (y_ND * grad_ND).sum(dim=-1).index_select(0, inverse_N)
        # Rows that fill up have weight 0.
        weights_N = grad_ND.new_zeros(len(order_N)).scatter_(0, inverse_N, weights_TK.flatten())
        grad_y_ND = grad_ND * weights_N[:, None]
        return grad_y_ND, grad_weights_N.view_as(weights_TK), None, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [gate, up] side by side; backward writes both gradients where they belong.

    Autograd would make them apart and copy them together: a twelfth of the time of an expert.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate_NF, up_NF = gate_up.chunk(2, dim=-1)
        return F.silu(gate_NF).mul_(up_NF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate_NF, up_NF = gate_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up)
        grad_gate_NF, grad_up_NF = grad.chunk(2, dim=-1)
        h_NF = F.silu(gate_NF)
        torch.mul(grad_NF, h_NF, out=grad_up_NF)
        torch.mul(grad_NF, up_NF, out=h_NF)
        torch.ops.aten.silu_backward.grad_input(h_NF, gate_NF, grad_input=grad_gate_NF)
        return grad


def activate(config: ExpertConfig, gate_up: Tensor) -> Tensor:
    """What an expert does between its two products, [N, 2F] -> [N, F]; [N, F] -> [N, F] without a gate."""
    if config.expert_activation == "gelu":
        return F.gelu(gate_up, approximate="tanh")
    if config.expert_activation == "swiglu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _SwiGLU.apply(gate_up)
    gate_NF, up_NF = gate_up.chunk(2, dim=-1)
    if config.expert_activation == "swiglu":
        return F.silu(gate_NF) * up_NF
    gate_NF = gate_NF.clamp(max=config.swiglu_limit)
    up_NF = up_NF.clamp(-config.swiglu_limit, config.swiglu_limit)
    return gate_NF * torch.sigmoid(config.swiglu_alpha * gate_NF) * (up_NF + 1)


def rows_of(values_EX: Tensor, ends_E: Tensor, num_rows: int) -> Tensor:
    """[N, X]: to each row the values of its expert.

    A product with ones and zeros: its backward sums in a fixed order, where that of an index would not on CUDA.
    """
    rows_N = torch.arange(num_rows, device=ends_E.device)
    below_NE = rows_N[:, None] < ends_E
    first_NE = below_NE.diff(dim=-1, prepend=below_NE.new_zeros(num_rows, 1))
    return first_NE.to(values_EX.dtype) @ values_EX


class GroupedExperts(nn.Module):
    """All experts of a layer; called as Hugging Face's experts are, `experts(x, expert_ids, weights)`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.experts
        self.num_experts = config.num_experts
        inward = config.experts.inward_matrices * config.expert_dim
        gate_up = torch.empty(config.num_experts, inward, config.dim)
        self.gate_up_proj = nn.Parameter(gate_up)
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.dim, config.expert_dim))
        biased = config.experts.expert_bias
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(gate_up.shape[:2])) if biased else None
        self.down_proj_bias = nn.Parameter(torch.zeros(self.down_proj.shape[:2])) if biased else None

    def forward(
        self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of every token's experts, [T, D].

        Slots that are not in `kept_TK` must have weight 0. They are not computed; but under compilation, whose
        shapes are fixed, they are.
        """
        compiling = torch.compiler.is_compiling()
        if kept_TK is not None and not compiling:
            return self._kept_only(x_TD, expert_ids_TK, weights_TK, kept_TK)
        if len(x_TD) == 1 and x_TD.device.type == "cpu" and not torch.is_grad_enabled():
            one_token = self._one_token_compiled if compiling else self._one_token
            return one_token(x_TD, expert_ids_TK, weights_TK)
        x_TD = x_TD.to(dtype := matmul_dtype(x_TD))
        multiple, product = 1, grouped_mm
        if not compiling and few_rows(x_TD, expert_ids_TK.numel(), self.num_experts):
            multiple, product = ROWS, few_rows_mm
        elif not compiling:
            multiple = row_multiple(x_TD, expert_ids_TK.numel(), self.num_experts)
        order_N, inverse_N, ends_E = dispatch(expert_ids_TK, self.num_experts, multiple)
        x_ND = _ToExperts.apply(x_TD, order_N, inverse_N)
        y_ND = self._run(x_ND, ends_E, product)
        return _ToTokens.apply(y_ND, weights_TK.to(dtype), order_N, inverse_N)

    def _one_token(self, x_1D: Tensor, expert_ids_1K: Tensor, weights_1K: Tensor) -> Tensor:
        """Expert by expert: for the one token of a decoding step, sorting would cost more than the products."""
        ids, dtype = expert_ids_1K[0].tolist(), matmul_dtype(x_1D)
        x_1D, into, out_of = x_1D.to(dtype), self.gate_up_proj, self.down_proj
        gate_up = torch.cat([row_times(x_1D, into[expert].to(dtype)) for expert in ids])
        if self.gate_up_proj_bias is not None:
            gate_up = gate_up + self.gate_up_proj_bias[ids].to(dtype)
        h_KF = activate(self.config, gate_up)
        y_KD = torch.cat([row_times(h_KF[k : k + 1], out_of[e].to(dtype)) for k, e in enumerate(ids)])
        if self.down_proj_bias is not None:
            y_KD = y_KD + self.down_proj_bias[ids].to(dtype)
        return weights_1K.to(dtype) @ y_KD

    def _one_token_compiled(self, x_1D: Tensor, expert_ids_1K: Tensor, weights_1K: Tensor) -> Tensor:
        """The same in two passes over the matrices of the chosen, which a compiler reads where they lie."""
        ids, dtype = expert_ids_1K[0], matmul_dtype(x_1D)
        gate_up = rows_by(x_1D.to(dtype), self.gate_up_proj[ids].to(dtype))
        if self.gate_up_proj_bias is not None:
            gate_up = gate_up + self.gate_up_proj_bias[ids].to(dtype)
        y_KD = rows_by(activate(self.config, gate_up), self.down_proj[ids].to(dtype))
        if self.down_proj_bias is not None:
            y_KD = y_KD + self.down_proj_bias[ids].to(dtype)
        return (weights_1K[0, :, None].to(dtype) * y_KD).sum(0, keepdim=True)

    def _kept_only(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor) -> Tensor:
        slots_N = kept_TK.flatten().nonzero().squeeze(1)
        ids_N = expert_ids_TK.flatten()[slots_N]
        slots_N = slots_N[ids_N.argsort(stable=True)]
        ends_E = count_experts(ids_N, self.num_experts).cumsum(0).to(torch.int32)
        dtype = matmul_dtype(x_TD)
        tokens_N = slots_N // kept_TK.shape[1]
        y_ND = self._run(x_TD.to(dtype).index_select(0, tokens_N), ends_E, grouped_mm)
        weights_N = weights_TK.to(dtype).flatten().index_select(0, slots_N)
        return torch.zeros_like(x_TD, dtype=dtype).index_add(0, tokens_N, y_ND * weights_N[:, None])

    def _run(
        self, x_ND: Tensor, ends_E: Tensor, product: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Each block of rows through its expert."""
        dtype = x_ND.dtype
        gate_up = product(x_ND, self.gate_up_proj.to(dtype), ends_E)
        if self.gate_up_proj_bias is not None:
            gate_up = gate_up + rows_of(self.gate_up_proj_bias.to(dtype), ends_E, len(x_ND))
        y_ND = product(activate(self.config, gate_up), self.down_proj.to(dtype), ends_E)
        if self.down_proj_bias is not None:
            y_ND = y_ND + rows_of(self.down_proj_bias.to(dtype), ends_E, len(x_ND))
        return y_ND

    def extra_repr(self) -> str:
        experts, width, hidden = self.down_proj.shape
        return f"{experts} experts, {width} -> {hidden} -> {width}"
