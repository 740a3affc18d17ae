"""The part of a model's config that says how tokens find experts, and what an expert computes.

Plain data without torch. Every field is a flag of the command line, so names are used once in the whole
tree. What depends on the number of experts is checked by `ModelConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Score = Literal["softmax", "sigmoid", "softmax_topk"]
GroupScore = Literal["max", "top2_sum"]
RouterNoise = Literal["none", "shazeer", "gumbel"]
DropOrder = Literal["position", "prob"]
Chooser = Literal["token", "expert"]
BalanceScope = Literal["micro", "sequence", "global"]
ExpertActivation = Literal["swiglu", "clamped", "gelu"]


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

    router_noise: RouterNoise = "none"
    """Noise on the logits in training: shazeer (normal, its size learned, arXiv:1701.06538) or gumbel."""
    noise_scale: float = 1.0
    """Factor on that noise."""
    router_jitter: float = 0.0
    """In training, multiply the router's input by uniform numbers in [1 - x, 1 + x] (arXiv:2101.03961)."""
    noise_seed: int = 0
    """Decides noise, jitter and expert dropout, apart from all other random numbers."""
    expert_dropout: float = 0.0
    """In training, switch each expert of a layer off for a whole pass with this probability."""
    force_balanced: bool = False
    """Ignore the scores and deal experts out in turn: an even load, to time a model by."""
    capacity_factor: float = 0.0
    """In training, an expert takes this many times an even share of a sequence's slots. 0: all (dropless)."""
    drop_order: DropOrder = "position"
    """Who is dropped beyond that: position, the last to come; prob, the smallest weight (not causal)."""
    chooser: Chooser = "token"
    """token: tokens choose experts; expert: each expert takes its best tokens (not causal)."""
    balance_scope: BalanceScope = "micro"
    """What the balance loss evens out: a micro-batch, each sequence, or all of a step that is known so far."""
    orthogonality: bool = False
    """Return SimBal's loss, which keeps the router's rows orthonormal (arXiv:2506.14038)."""

    def __post_init__(self) -> None:
        for name in ("noise_scale", "capacity_factor", "router_jitter", "noise_seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"router.{name}={getattr(self, name)} is negative; 0 switches it off")
        if not 0 <= self.expert_dropout < 1 or self.router_jitter >= 1:
            raise ValueError(
                f"router.expert_dropout={self.expert_dropout} and router_jitter={self.router_jitter} must be "
                "in [0, 1); 0 switches them off"
            )
        if self.chooser == "expert" and (self.selection_bias or self.num_groups > 1 or self.force_balanced):
            raise ValueError(
                "router.chooser=expert needs no balancing and has no top-k; leave selection_bias, num_groups "
                "and force_balanced at their defaults"
            )
        if self.chooser == "expert" and self.score == "softmax_topk":
            raise ValueError("router.chooser=expert has no chosen K to normalise over; use score=softmax")
        if self.scale <= 0:
            raise ValueError(f"router.scale={self.scale} is not positive; 1.0 leaves the gate weights alone")
        if self.num_groups < 1:
            raise ValueError(f"router.num_groups={self.num_groups} is below 1; 1 means no groups")
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(
                f"router.top_groups={self.top_groups} is not between 1 and num_groups={self.num_groups}; "
                "lower top_groups or add groups"
            )

    @property
    def draws(self) -> bool:
        """Whether training needs random numbers for routing."""
        return self.router_noise != "none" or self.router_jitter > 0 or self.expert_dropout > 0

    @property
    def is_causal(self) -> bool:
        """Whether a token's experts depend on nothing behind it."""
        return self.chooser == "token" and (self.capacity_factor == 0 or self.drop_order == "position")


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """What one expert computes: down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    expert_activation: ExpertActivation = "swiglu"
    """swiglu: silu(gate) * up; clamped (GPT-OSS): both clamped, gate * sigmoid(alpha gate) * (up + 1); gelu: two
    matrices instead of three, without a gate (tanh approximation)."""
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

    @property
    def inward_matrices(self) -> int:
        """Matrices from the stream into the hidden layer: a gate and its values, or one."""
        return 1 if self.expert_activation == "gelu" else 2
