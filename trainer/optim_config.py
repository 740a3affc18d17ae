"""The optimizer, its rate over the run, and what balances the experts, as plain data without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moeviz.errors import MoevizError


def require_rule(holds: bool, value: str, rule: str) -> None:
    """Raise a MoevizError that names a value and the rule it breaks."""
    if not holds:
        raise MoevizError(f"{value} {rule}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101), or another one beside it."""

    optimizer: Literal["adamw", "muon", "schedulefree"] = "adamw"
    """adamw; muon: for the matrices inside of blocks, each expert's its own, AdamW for the rest; schedulefree: AdamW
    that averages its weights instead of lowering its rate (needs that library, and --schedule constant)."""
    learning_rate: float = 1e-3
    """Peak learning rate, after the warm-up."""
    weight_decay: float = 0.1
    """Decoupled decay of the matrices; norms, biases and other vectors are never decayed."""
    beta1: float = 0.9
    """Decay of the running mean of the gradient."""
    beta2: float = 0.95
    """Decay of the running mean of its square."""
    adam_eps: float = 1e-8
    """Added to the root of that mean."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient, longer ones are scaled down to it. 0: no clipping."""
    expert_grad_every: int = 0
    """Record the gradient norm of every expert each n steps, as expert_grad_norm/LAYER/EXPERT. 0: never."""

    def __post_init__(self) -> None:
        rate = self.learning_rate
        require_rule(rate > 0, f"learning_rate={rate}", "is not positive; 1e-3 is a start")
        for name in ("weight_decay", "grad_clip", "expert_grad_every"):
            value = getattr(self, name)
            require_rule(value >= 0, f"{name}={value}", "is negative; 0 switches it off")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require_rule(0 <= value < 1, f"{name}={value}", "is not in [0, 1); 0.9 is usual")
        require_rule(self.adam_eps > 0, f"adam_eps={self.adam_eps}", "is not positive; 1e-8 is usual")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the run, as a share of its peak."""

    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; wsd stays at the peak and falls linearly over the last `decay_share`."""
    warmup_steps: int = 50
    """Steps in which the rate rises linearly from zero to its peak."""
    min_lr_ratio: float = 0.1
    """Last learning rate over the peak."""
    decay_share: float = 0.2
    """Share of the run in which wsd falls."""
    lr_steps: int | None = None
    """Steps after which the schedule has run out. None: max_steps."""

    def __post_init__(self) -> None:
        require_rule(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps}", "is negative; 0 means none")
        for name in ("min_lr_ratio", "decay_share"):
            value = getattr(self, name)
            require_rule(0 <= value <= 1, f"{name}={value}", "is not between 0 and 1; it is a share")
        if self.lr_steps is not None:
            require_rule(
                self.lr_steps >= 1, f"lr_steps={self.lr_steps}", "is below 1; leave it out for max_steps"
            )


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """What keeps the experts evenly used."""

    balance: Literal["none", "aux", "bias"] = "bias"
    """none; aux: the load balancing loss; bias: a selection bias moved after each step, without a loss."""
    aux_coef: float = 1e-2
    """Weight of the balance loss, which is 1 for an even load (balance=aux)."""
    z_coef: float = 1e-3
    """Weight of the router z-loss, the mean squared logsumexp of the router's logits. 0 switches it off."""
    bias_step: float = 1e-3
    """How far an expert's bias moves after a step (balance=bias)."""
    orthogonality_coef: float = 0.1
    """Weight of SimBal's loss on the router's rows, for a model with --orthogonality."""
    contrastive_coef: float = 0.1
    """Weight of the contrastive loss, for a model with --contrastive-width; sequences of one domain belong together."""
    mtp_coef: float = 0.3
    """Weight of the loss of further tokens, for a model with --mtp-depth: nats, mean over depths (DeepSeek-V3: 0.3,
    and 0.1 at the end)."""

    def __post_init__(self) -> None:
        for name in ("aux_coef", "z_coef", "bias_step", "orthogonality_coef", "contrastive_coef", "mtp_coef"):
            value = getattr(self, name)
            require_rule(value >= 0, f"{name}={value}", "is negative; 0 switches it off")
