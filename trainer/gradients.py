"""The gradient of every expert, as one norm each: a starving expert shows here before its load tells."""

from __future__ import annotations

import torch
from torch import Tensor

from model.experts import GroupedExperts
from trainer.engine import Engine


def expert_grad_norms(engine: Engine) -> dict[str, float]:
    """Norms over all weights of an expert, before clipping, by `expert_grad_norm/LAYER/EXPERT` (MoE layer, from 0).

    Every rank must call it. Experts without trainable weights are left out.
    """
    stacks = [name for name, module in engine.module.named_modules() if isinstance(module, GroupedExperts)]
    norms: dict[str, float] = {}
    for layer, stack in enumerate(stacks):
        squares_E = _squares(engine, stack)
        if squares_E is not None:
            names = (f"expert_grad_norm/{layer}/{expert}" for expert in range(len(squares_E)))
            norms |= dict(zip(names, squares_E.sqrt().tolist(), strict=True))
    return norms


def _squares(engine: Engine, stack: str) -> Tensor | None:
    """Sum of squares of each expert's gradient."""
    total_E: Tensor | None = None
    for name, _ in engine.module.get_submodule(stack).named_parameters():
        gradient = engine.gradient(f"{stack}.{name}")
        if gradient is not None:
            part_E = torch.linalg.vector_norm(gradient.flatten(1), dim=1).square()
            total_E = part_E if total_E is None else total_E + part_E
    return total_E
