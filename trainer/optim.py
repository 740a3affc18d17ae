"""One optimizer for the run: fused AdamW over two groups, matrices with weight decay and vectors without.

Expert weights are stacks of matrices and decay like them. Every parameter is in exactly one group, also when
it is used twice (tied embeddings), because groups are made from `named_parameters`, which names each tensor
once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from trainer.config import OptimConfig


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters by their number of axes: two or more decay, one or none does not.

    Args:
        named: `model.named_parameters()`, or masters under the same names.
        weight_decay: decay of the first group.
    """
    trainable = [(name, weight) for name, weight in named if weight.requires_grad]
    matrices = [weight for _, weight in trainable if weight.ndim >= 2]
    vectors = [weight for _, weight in trainable if weight.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with the run's constants; the learning rate is set before each step by `set_learning_rate`."""
    return torch.optim.AdamW(
        parameter_groups(named, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,
    )


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Give every group of a torch (or DeepSpeed-wrapped) optimizer the rate of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
