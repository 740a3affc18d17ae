"""The part of a model's config that says how tokens find experts, and what an expert computes.

Plain data without torch. Every field is a flag of the command line, so names are used once in the whole
tree. What depends on the number of experts is checked by `ModelConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Score = Literal["softmax", "sigmoid", "softmax_topk"]
GroupScore = Literal["max", "top2_sum"]
ExpertActivation = Literal["swiglu", "clamped"]


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How a token chooses its experts."""

    score: Score = "softmax"
    """Scores from logits: softmax over all experts, a sigmoid for each, or softmax over the chosen K only."""
    norm_topk: bool = True
    """Divide the K gate weights by their sum (softmax_topk does so by construction)."""
    scale: float = 1.0
    """Factor on the gate weights after normalising (DeepSeek's routed scaling factor)."""
    num_groups: int = 1
    """Split the experts into this many equal groups; a token picks groups first. 1: no groups."""
    top_groups: int = 1
    """Groups from which a token may choose its experts."""
    group_score: GroupScore = "top2_sum"
    """What ranks a group: its best expert (DeepSeek-V2) or the sum of its best two (DeepSeek-V3)."""
    selection_bias: bool = False
    """A bias per expert that steers selection, not gate weights: balance without an auxiliary loss."""
    router_bias: bool = False
    """A learned bias on the logits themselves (GPT-OSS): it does enter the gate weights."""

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError(f"router.scale={self.scale} is not positive; 1.0 leaves the gate weights alone")
        if self.num_groups < 1:
            raise ValueError(f"router.num_groups={self.num_groups} is below 1; 1 means no groups")
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(
                f"router.top_groups={self.top_groups} is not between 1 and num_groups={self.num_groups}; "
                "lower top_groups or add groups"
            )


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """What one expert computes: down(act(gate(x)) * up(x))."""

    expert_activation: ExpertActivation = "swiglu"
    """swiglu: silu(gate) * up; clamped (GPT-OSS): both clamped, gate * sigmoid(alpha gate) * (up + 1)."""
    swiglu_alpha: float = 1.702
    """Steepness of the sigmoid of expert_activation=clamped; 1.702 is close to GELU."""
    swiglu_limit: float = 7.0
    """What expert_activation=clamped clamps to: gate from above, up on both sides."""
    expert_bias: bool = False
    """Biases in both layers of every routed expert (GPT-OSS)."""
    shared_expert_gate: bool = False
    """Weigh the shared experts by a sigmoid of the token (Qwen2-MoE)."""

    def __post_init__(self) -> None:
        for name in ("swiglu_alpha", "swiglu_limit"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} is not positive; give a number above 0")
