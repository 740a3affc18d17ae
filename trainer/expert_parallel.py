"""Experts that several ranks share: each holds E / n of a layer's, and tokens travel to them and back.

The layer is DeepSpeed's `MoE` (Rajbhandari et al. 2022, https://arxiv.org/abs/2201.05596), so its engine makes the
groups, adds an expert's gradients over the ranks that hold it only, divides its optimizer state among them, and writes
each rank's experts into checkpoints. What DeepSpeed's own layer would do with the tokens is not taken: its gate knows
softmax with a capacity alone, and it sends all experts as many rows as the busiest one gets. Here the model's router
decides, every variant of it, and exactly the rows it chose are sent: the numbers are those of ranks that share nothing.

DeepSpeed is imported here: import this module after it is known to be there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn
from torch import distributed as dist

from model.experts import GroupedExperts, count_experts
from model.moe import SparseMoE
from model.precision import matmul_dtype

_INSIDE = "deepspeed_moe.experts.deepspeed_experts.0."
"""Where DeepSpeed looks for an expert below its layer; here all experts of a rank are one of its experts."""
GATE = "experts.deepspeed_moe.gate.wg.weight"
"""The router's matrix where DeepSpeed's gate has it."""


class ParallelExperts(MoE):
    """All experts of a layer, a share of them here; called as `model.experts.GroupedExperts` is."""

    needs_every_rank = True
    """Whoever calls it must call it on all ranks."""

    def __init__(self, experts: GroupedExperts, ranks: int) -> None:
        """
        Args:
            experts: all of them; this rank's share is taken out of it, in place.
            ranks: that share them, a divisor of their number.
        """
        nn.Module.__init__(self)
        self.ep_size = ranks
        self.expert_group_name = f"ep_size_{ranks}"
        self.num_experts, self.num_local_experts = ranks, 1
        self.use_residual = self.enable_expert_tensor_parallelism = False
        keep_share(experts, groups._get_expert_parallel_rank(self.expert_group_name), ranks)
        self.deepspeed_moe = _Exchange(experts, self.expert_group_name, ranks)

    def forward(  # type: ignore[override]
        self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of every token's experts, [T, D]; slots that are not in `kept_TK` are not computed."""
        return self.deepspeed_moe(x_TD, expert_ids_TK, weights_TK, kept_TK)


def keep_share(experts: GroupedExperts, place: int, ranks: int) -> None:
    """Leave the `place`-th of `ranks` equal parts of the experts, in place."""
    share = experts.num_experts // ranks
    experts.num_experts = share
    for name, weight in list(experts.named_parameters()):
        mine = weight.detach()[place * share : (place + 1) * share].clone()
        setattr(experts, name, nn.Parameter(mine, requires_grad=weight.requires_grad))


class _Exchange(nn.Module):
    """Sends tokens to the ranks of their experts, and brings back what those made of them."""

    def __init__(self, experts: GroupedExperts, group_name: str, ranks: int) -> None:
        super().__init__()
        self.experts = Experts(experts, 1, group_name)
        self.ranks = ranks
        self.group: Any = None

    def _set_ep_group(self, group: Any) -> None:
        """DeepSpeed's engine calls this once it has made the groups."""
        self.group = group

    def forward(
        self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None
    ) -> Tensor:
        local = self.experts.deepspeed_experts[0]
        assert isinstance(local, GroupedExperts)
        ids_N = expert_ids_TK.flatten()
        order_N = ids_N.argsort(stable=True)
        if kept_TK is not None:
            order_N = order_N[kept_TK.flatten()[order_N]]
        tokens_N = order_N // expert_ids_TK.shape[1]
        sent_RE = count_experts(ids_N[order_N], self.ranks * local.num_experts).view(self.ranks, -1)
        got_RE = torch.empty_like(sent_RE)
        dist.all_to_all_single(got_RE, sent_RE, group=self.group)
        sent, got = (counts_RE.sum(dim=1).tolist() for counts_RE in (sent_RE, got_RE))
        dtype = matmul_dtype(x_TD)
        x_MD = _AllToAll.apply(x_TD.to(dtype).index_select(0, tokens_N), sent, got, self.group)
        y_ND = _AllToAll.apply(rows_through(local, x_MD, got_RE), got, sent, self.group)
        weights_N = weights_TK.to(dtype).flatten().index_select(0, order_N)
        return torch.zeros_like(x_TD, dtype=dtype).index_add(0, tokens_N, y_ND * weights_N[:, None])


def rows_through(experts: GroupedExperts, x_MD: Tensor, got_RE: Tensor) -> Tensor:
    """Each row through its expert; rows come rank by rank, `got_RE` of each, sorted by expert within a rank."""
    rows = len(x_MD)
    local_RE = torch.arange(experts.num_experts, device=x_MD.device).expand_as(got_RE)
    ids_M = local_RE.flatten().repeat_interleave(got_RE.flatten(), output_size=rows)
    if not rows:  # a row of zeros for nobody: without one, gradients that other ranks add to would not exist
        x_MD, ids_M = torch.cat([x_MD, x_MD.new_zeros(1, x_MD.shape[1])]), ids_M.new_zeros(1)
    one_M1 = torch.ones_like(ids_M, dtype=x_MD.dtype)[:, None]
    return experts(x_MD, ids_M[:, None], one_M1)[:rows]


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks, as many to each as it says; backward sends their gradients back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], got: list[int], group: Any) -> Tensor:
        ctx.sent, ctx.got, ctx.group = sent, got, group
        return _moved(rows, sent, got, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _moved(grad, ctx.got, ctx.sent, ctx.group), None, None, None


def _moved(rows: Tensor, sent: list[int], got: list[int], group: Any) -> Tensor:
    arrived = rows.new_empty(sum(got), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), got, sent, group=group)
    return arrived


def share_experts(model: nn.Module, ranks: int, *, data_first: bool = False) -> ExpertShares:
    """Leave on this rank its share of every layer's experts, in place. Every rank must call it.

    Args:
        ranks: that share the experts of a layer, a divisor of their number and of that of all ranks.
        data_first: DeepSpeed's `use_data_before_expert_parallelism`: which ranks those are.
    """
    groups._create_expert_and_data_parallel(ranks, use_data_before_expert_parallel_=data_first)
    for layer in moe_layers(model):
        layer.experts = ParallelExperts(layer.experts, ranks)  # type: ignore[assignment]
    return ExpertShares(ranks)


def moe_layers(model: nn.Module) -> list[SparseMoE]:
    """First layer first."""
    return [module for module in model.modules() if isinstance(module, SparseMoE)]


class ExpertShares:
    """What an engine must know of shared experts: their names, their whole weights, the norm of their gradients."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._group = groups._get_expert_parallel_group(f"ep_size_{ranks}")

    def whole(self, name: str, value: Tensor) -> Tensor:
        """A parameter, or something of its shape, with the rows of all experts. Every rank must call it."""
        if _INSIDE not in name:
            return value
        parts = [torch.empty_like(value) for _ in range(self._ranks)]
        dist.all_gather(parts, value.detach().contiguous(), group=self._group)
        return torch.cat(parts)

    def whole_weights(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """A state under the names, and with the shapes, of a model that shares nothing. Every rank must call it."""
        for name, value in state.items():
            yield name.replace(_INSIDE, "").replace(GATE, "gate.weight"), self.whole(name, value)

    def norm(self, named: Mapping[str, Tensor]) -> Tensor:
        """Norm over all tensors, those of experts that other ranks hold among them. Every rank must call it."""
        squares = torch.zeros(2, device=next(iter(named.values())).device)
        for name, value in named.items():
            squares[int(_INSIDE in name)] += torch.linalg.vector_norm(value.float()).square()
        dist.all_reduce(squares[1:], group=self._group)
        return squares.sum().sqrt()
