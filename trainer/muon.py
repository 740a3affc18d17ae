"""Muon for the matrices of a model, AdamW for everything else, in one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by its
nearest orthogonal one, found by five Newton-Schulz steps in bfloat16. The experts of a layer are one tensor
[E, rows, columns]; each slice is a matrix of its own, and all of a stack are worked on in one batched product.
The rate of a matrix is scaled to the size of an AdamW update (Liu et al. 2025, https://arxiv.org/abs/2502.16982),
so that one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
_QUINTIC = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_EPS = 1e-7
_NOT_HIDDEN = ("embed_tokens", "lm_head", "gate.weight", "noise_weight", "contrastive")
"""Rows of these stand for tokens and experts: to orthogonalise them would make rare ones as large as common ones."""


def is_hidden_matrix(name: str, weight: Tensor) -> bool:
    """Whether Muon takes a parameter: a matrix or a stack of them inside a block, routers left out."""
    return weight.ndim >= 2 and not any(part in name for part in _NOT_HIDDEN)


@torch.no_grad()
def orthogonalised(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrix of each slice [..., rows, columns], roughly: singular values in 0.5 to 1.5.

    bfloat16, computed for all slices at once; equal to `torch.optim.Muon` of each slice up to its rounding.
    """
    a, b, c = _QUINTIC
    shape = matrices.shape
    x = matrices.reshape(-1, *shape[-2:]).bfloat16()
    tall = shape[-2] > shape[-1]
    if tall:
        x = x.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_EPS)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(shape)


class Muon(torch.optim.AdamW):
    """AdamW whose groups marked `muon` take Muon steps."""

    def __init__(self, groups: Iterable[dict[str, Any]], **adamw: Any) -> None:
        """
        Args:
            groups: as of any optimizer, each with `muon`: True for matrices only.
            **adamw: constants of AdamW.
        """
        super().__init__([{"muon": False, **group} for group in groups], **adamw)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                for weight in group["params"]:
                    if weight.grad is not None:
                        self._turn(weight, group["lr"], group["weight_decay"])

    def _turn(self, weight: nn.Parameter, rate: float, decay: float) -> None:
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
            state["step"] = torch.zeros(())  # unused; AdamW looks for it when a state is loaded
        momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - MOMENTUM)
        update = orthogonalised(weight.grad.lerp(momentum, MOMENTUM))
        rows, columns = weight.shape[-2:]
        weight.mul_(1 - rate * decay)
        weight.add_(update, alpha=-rate * 0.2 * max(rows, columns) ** 0.5)
