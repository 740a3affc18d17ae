"""Run a block so that its activations are computed again in backward, instead of kept."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def run_block(block: nn.Module, recompute: bool, *args: Any) -> Any:
    """`block(*args)`; with `recompute`, in training, only its arguments and its choice of experts are kept."""
    if not (recompute and block.training and torch.is_grad_enabled()):
        return block(*args)
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_choice)
    return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)


def _keep_choice(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Save which experts were chosen: recomputed, a tie may fall the other way and change the gradients."""
    if op == torch.ops.aten.topk.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
