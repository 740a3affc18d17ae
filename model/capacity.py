"""What happens when an expert may only take so many tokens: slots are dropped, or experts do the choosing.

Limits are per sequence, so that no text depends on what it was batched with. Dropping by position is causal:
a later token can only be turned away by earlier ones. Dropping by weight and choice by experts are not: a
later token can push an earlier one out, so such a model sees the future in training and cannot in generation
(`ModelConfig.is_causal`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.expert_config import DropOrder


def capacity_of(seq_len: int, top_k: int, num_experts: int, factor: float) -> int:
    """Slots of one sequence that an expert takes: `factor` times an even share, rounded up, at least 1."""
    return min(max(1, math.ceil(factor * seq_len * top_k / num_experts - 1e-9)), seq_len)


def keep_within_capacity(
    expert_ids_BSK: Tensor,
    weights_BSK: Tensor,
    num_experts: int,
    capacity: int,
    order: DropOrder,
    valid_BS: Tensor | None = None,
) -> Tensor:
    """bool [B, S, K]: the slots that their expert takes.

    Args:
        expert_ids_BSK: chosen experts.
        weights_BSK: gate weights; they rank the slots of an expert with order=prob.
        num_experts: E.
        capacity: slots of one sequence that an expert takes.
        order: position: first come, first served, a token's first slot before its second; prob: by weight.
        valid_BS: False for padding, which takes no place. None: all valid.
    """
    batch = expert_ids_BSK.shape[0]
    ids_BN = expert_ids_BSK.reshape(batch, -1)
    wants_BNE = ids_BN[..., None] == torch.arange(num_experts, device=ids_BN.device)
    if valid_BS is not None:
        wants_BNE = wants_BNE & valid_BS.repeat_interleave(expert_ids_BSK.shape[2], dim=1)[..., None]
    if order == "prob":
        ranking_BN = weights_BSK.detach().reshape(batch, -1).argsort(dim=1, descending=True, stable=True)
        wants_BNE = wants_BNE.gather(1, ranking_BN[..., None].expand_as(wants_BNE))
    taken_BNE = wants_BNE & (wants_BNE.cumsum(dim=1) <= capacity)
    taken_BN = taken_BNE.any(dim=-1)
    if order == "prob":
        taken_BN = torch.zeros_like(taken_BN).scatter(1, ranking_BN, taken_BN)
    return taken_BN.view_as(expert_ids_BSK)


def experts_choose(scores_BSE: Tensor, capacity: int, valid_BS: Tensor | None = None) -> Tensor:
    """int64 [B, C, E]: the C positions of each sequence that each expert scores highest (arXiv:2202.09368)."""
    if valid_BS is not None:
        scores_BSE = scores_BSE.masked_fill(~valid_BS[..., None], float("-inf"))
    return scores_BSE.topk(capacity, dim=1).indices
