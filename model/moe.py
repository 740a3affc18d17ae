"""The Mixture-of-Experts layer: a router, its experts, and the experts that every token shares.

The routing is part of the result, not a side effect: losses and counts are computed from it once, outside
of any recomputed region, and nothing in a forward pass writes to a buffer.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from model.config import ModelConfig
from model.experts import GroupedExperts
from model.feedforward import FeedForward
from model.router import Routing, TopKRouter
from model.router_draws import RouterDraws


class MoEOutput(NamedTuple):
    hidden_BSD: Tensor
    routing: Routing


class SparseMoE(nn.Module):
    """Routed experts, plus `shared_experts` for every token where the config asks for them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = TopKRouter(config)
        self.experts = GroupedExperts(config)
        self.shared_experts = FeedForward(config.dim, config.shared_dim) if config.shared_dim else None
        gated = config.experts.shared_expert_gate
        self.shared_expert_gate = nn.Linear(config.dim, 1, bias=False) if gated else None

    def forward(
        self, x_BSD: Tensor, draws: RouterDraws | None = None, valid_BS: Tensor | None = None
    ) -> MoEOutput:
        x_TD = x_BSD.flatten(0, 1)
        routing = self._route(x_BSD, x_TD, draws, valid_BS)
        kept = () if routing.kept_TK is None else (routing.kept_TK,)
        y_BSD = self.experts(x_TD, routing.expert_ids_TK, routing.weights_TK, *kept).view_as(x_BSD)
        return MoEOutput(self._with_shared(x_BSD, y_BSD), routing)

    def _with_shared(self, x_BSD: Tensor, y_BSD: Tensor) -> Tensor:
        if self.shared_experts is None:
            return y_BSD
        shared_BSD = self.shared_experts(x_BSD)
        if self.shared_expert_gate is not None:
            shared_BSD = shared_BSD * self.shared_expert_gate(x_BSD).sigmoid()
        return y_BSD + shared_BSD

    def _route(
        self, x_BSD: Tensor, x_TD: Tensor, draws: RouterDraws | None, valid_BS: Tensor | None
    ) -> Routing:
        """Sequences and padding are the router's business only where experts have a capacity."""
        config = self.gate.config
        if config.capacity_factor or config.chooser == "expert":
            return self.gate(x_BSD, draws, valid_BS)
        return self.gate(x_TD) if draws is None else self.gate(x_TD, draws)
