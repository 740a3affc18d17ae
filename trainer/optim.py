"""One optimizer for the run, over groups of parameters: matrices with weight decay and vectors without.

Expert weights are stacks of matrices and decay like them. Every parameter is in exactly one group, also when
it is used twice (tied embeddings), because groups are made from `named_parameters`, which names each tensor
once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moeviz.errors import require
from trainer.config import OptimConfig
from trainer.muon import Muon, is_hidden_matrix


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, *, muon: bool = False
) -> list[dict[str, Any]]:
    """Split trainable parameters by their number of axes: two or more decay, one or none does not.

    Args:
        named: `model.named_parameters()`, or masters under the same names.
        weight_decay: decay of the matrices.
        muon: put the matrices inside of blocks into a group of their own, marked `muon`.
    """
    trainable = [(name, weight) for name, weight in named if weight.requires_grad]
    turned = [weight for name, weight in trainable if muon and is_hidden_matrix(name, weight)]
    taken = {id(weight) for weight in turned}
    others = [weight for _, weight in trainable if id(weight) not in taken]
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in others if weight.ndim >= 2], "weight_decay": weight_decay},
        {"params": [weight for weight in others if weight.ndim < 2], "weight_decay": 0.0},
        {"params": turned, "weight_decay": weight_decay, "muon": True},
    ]
    return [part for group in groups if group["params"] for part in _by_holders(group)]


def _by_holders(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group cut in two where some weights are on some ranks only, and marked for DeepSpeed, which marks those."""
    shared = [weight for weight in group["params"] if not getattr(weight, "allreduce", True)]
    if not shared:
        return [group]
    taken = {id(weight) for weight in shared}
    rest = [weight for weight in group["params"] if id(weight) not in taken]
    marked = {**group, "params": shared, "moe": True, "name": shared[0].group_name}
    return [{**group, "params": rest}, marked] if rest else [marked]


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer that the config names; the learning rate is set before each step by `set_learning_rate`.

    Raises:
        MissingExtraError: schedule-free without its library.
    """
    muon = config.optimizer == "muon"
    groups = parameter_groups(named, config.weight_decay, muon=muon)
    constants: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.adam_eps,
    }
    if config.optimizer == "schedulefree":
        library = require("schedulefree", "schedulefree", "--optimizer schedulefree")
        optimizer = library.AdamWScheduleFree(groups, **constants)
        optimizer.train()
        optimizer.state.clear()  # it looked every weight up, and ZeRO puts other tensors in their place
        return optimizer
    return (Muon if muon else torch.optim.AdamW)(groups, fused=True, **constants)


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Give every group of a torch (or DeepSpeed-wrapped) optimizer the rate of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def forget_rows(state: dict[str, Any], weight: Tensor, rows: list[int]) -> None:
    """Begin the running means of these rows of a parameter anew; what follows the weight itself follows it."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            value[rows] = weight[rows] if key == "z" else 0
