"""Layers whose gate is DeepSpeed's as well: softmax and top-k, with one capacity for a rank's whole micro-batch.

For studies of what that gate does, with its dispatch and its drops: `deepspeed.moe.layer.MoE` as it is, around the
experts of the model. All experts get as many rows as their capacity, or without one as the busiest expert of any rank
got. Who is dropped depends on the rest of the batch, later tokens among it, so capacity ends with training: in
evaluation every token has its experts, and a checkpoint is that of the model's own router without capacity.

DeepSpeed is imported here: import this module after it is known to be there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

from model.experts import GroupedExperts
from model.lm import MoELanguageModel
from model.moe import MoEOutput, SparseMoE
from model.router import Routing, TopKRouter
from model.router_draws import RouterDraws
from trainer.expert_parallel import ExpertShares, keep_share, rows_through


class GatedMoE(SparseMoE):
    """A layer of the model with DeepSpeed's in the place of router and experts."""

    def __init__(self, layer: SparseMoE, ranks: int) -> None:
        """
        Args:
            layer: whose weights it takes; of a model that `trainer.config` lets have this gate.
            ranks: that share its experts.
        """
        nn.Module.__init__(self)
        router, experts = layer.gate, layer.experts
        assert isinstance(router, TopKRouter)
        self._capacity_factor = router.config.capacity_factor
        with torch.random.fork_rng(devices=[]):  # weights that are replaced below are drawn
            self.experts: MoE = _deepspeed_layer(router, experts, ranks)  # type: ignore[assignment]
        self.shared_experts, self.shared_expert_gate = layer.shared_experts, layer.shared_expert_gate
        self._routes: tuple[Tensor, Tensor] | None = None
        self._gate.register_forward_hook(self._keep)

    @property
    def _gate(self) -> Any:
        layer: Any = self.experts.deepspeed_moe
        return layer.gate

    def forward(
        self, x_BSD: Tensor, draws: RouterDraws | None = None, valid_BS: Tensor | None = None
    ) -> MoEOutput:
        y_BSD, _, _ = self.experts(x_BSD)
        return MoEOutput(self._with_shared(x_BSD, y_BSD), self._routing(x_BSD.flatten(0, 1)))

    def _keep(self, gate: nn.Module, args: Any, output: Any) -> None:
        """What the gate decided, which DeepSpeed's layer tells nobody."""
        self._routes = output[3].T.long(), output[5].T

    def _routing(self, x_TD: Tensor) -> Routing:
        """The decision as the model's router would tell it; losses get their gradient from the logits."""
        assert self._routes is not None
        (ids_TK, weights_TK), self._routes = self._routes, None
        logits_TE = F.linear(x_TD.float(), self._gate.wg.weight.float())
        kept_TK = ids_TK >= 0 if self._gate.drop_tokens else None
        if kept_TK is not None:  # a dropped slot has lost its expert's number
            ids_TK = torch.where(kept_TK, ids_TK, logits_TE.detach().topk(ids_TK.shape[1], dim=-1).indices)
        return Routing(logits_TE, weights_TK, ids_TK, kept_TK)

    def train(self, mode: bool = True) -> GatedMoE:
        self._gate.drop_tokens = mode and self._capacity_factor > 0
        super().train(mode)
        return self


def _deepspeed_layer(router: TopKRouter, experts: GroupedExperts, ranks: int) -> MoE:
    width, num_experts, factor = router.weight.shape[1], router.num_experts, router.config.capacity_factor
    layer = MoE(
        width,
        nn.Identity(),
        num_experts,
        ranks,
        router.top_k,
        capacity_factor=factor or 1.0,
        min_capacity=1,
        drop_tokens=factor > 0,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    layer.deepspeed_moe.gate.wg.weight = nn.Parameter(
        router.weight.detach().clone(), requires_grad=router.weight.requires_grad
    )
    keep_share(experts, groups._get_expert_parallel_rank(layer.expert_group_name), ranks)
    layer.deepspeed_moe.experts = _Stack(experts, layer.expert_group_name)
    # A rank's experts are one of DeepSpeed's, which writes and reads each of its own in a file.
    layer.num_experts, layer.num_local_experts = ranks, 1
    return layer


class _Stack(Experts):
    """A rank's experts, called as DeepSpeed calls them: with equally many rows for each."""

    def __init__(self, experts: GroupedExperts, group_name: str) -> None:
        super().__init__(experts, 1, group_name)

    def forward(self, inputs: Tensor) -> Tensor:
        """[ranks, experts, capacity, D] -> the same shape."""
        ranks, num_experts, capacity, width = inputs.shape
        rows_RE = torch.full((ranks, num_experts), capacity, device=inputs.device)
        return rows_through(self.deepspeed_experts[0], inputs.reshape(-1, width), rows_RE).view_as(inputs)


def take_gate(model: MoELanguageModel, ranks: int, *, data_first: bool = False) -> ExpertShares:
    """Put DeepSpeed's layer in the place of every MoE layer, in place. Every rank must call it.

    Args:
        ranks: that share the experts of a layer, a divisor of their number and of that of all ranks.
        data_first: DeepSpeed's `use_data_before_expert_parallelism`: which ranks those are.
    """
    groups._create_expert_and_data_parallel(ranks, use_data_before_expert_parallel_=data_first)
    for block in model.model.layers:
        if isinstance(block.mlp, SparseMoE):
            block.mlp = GatedMoE(block.mlp, ranks)
    return ExpertShares(ranks)
