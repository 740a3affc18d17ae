"""Muon for the matrices of a model, AdamW for everything else, in one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by its
nearest orthogonal one, found by five Newton-Schulz steps in bfloat16. The experts of a layer are one tensor
[E, rows, columns]; each slice is a matrix of its own, and all of a stack are worked on in one batched product.
The rate of a matrix is scaled to the size of an AdamW update (Liu et al. 2025, https://arxiv.org/abs/2502.16982),
so that one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from trainer.flat_shares import FlatShare

MOMENTUM = 0.95
_QUINTIC = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_EPS = 1e-7
_UNUSED = "exp_avg_sq"
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
        self.shares: dict[int, FlatShare] = {}
        """What is a flat share of matrices and not a weight, by `id`; see `trainer.flat_shares`."""

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

    def _turn(self, weight: Tensor, rate: float, decay: float) -> None:
        assert weight.grad is not None
        state = self.state[weight]
        state.pop(_UNUSED, None)
        if not state:
            state["exp_avg"] = torch.zeros_like(weight.grad)
            state["step"] = torch.zeros(())  # unused; AdamW looks for it when a state is loaded
        momentum = state["exp_avg"].lerp_(weight.grad, 1 - MOMENTUM)
        update = weight.grad.lerp(momentum, MOMENTUM).bfloat16()
        weight.mul_(1 - rate * decay)
        for matrices, here, part in self._whole(weight, update):
            turned = orthogonalised(matrices).flatten()[part]
            rows, columns = matrices.shape[-2:]
            weight.view(-1)[here].add_(turned, alpha=-rate * 0.2 * max(rows, columns) ** 0.5)

    def _whole(self, weight: Tensor, update: Tensor) -> Iterator[tuple[Tensor, slice, slice]]:
        """Matrices of `update`, where in `weight` they belong, and which of their elements."""
        if id(weight) in self.shares:
            yield from self.shares[id(weight)].completed(update)
        else:
            yield update, slice(None), slice(None)

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer, with what DeepSpeed looks for in a flat share when the number of ranks changes."""
        told = super().state_dict()
        if self.shares:
            told["state"] = {key: _with_unused(state) for key, state in told["state"].items()}
        return told


def _with_unused(state: dict[str, Any]) -> dict[str, Any]:
    momentum = state.get("exp_avg")
    if momentum is None or _UNUSED in state:
        return state
    return {**state, _UNUSED: torch.zeros(1, device=momentum.device).expand_as(momentum)}
