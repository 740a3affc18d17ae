"""What keeps routing healthy beside the cross-entropy: one loss per MoE layer, without coefficients.

Pure functions of the routings of a forward pass. The trainer decides what they weigh, so a
reported cross-entropy is a cross-entropy. L counts MoE layers here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.expert_config import RouterConfig
from model.router import Routing


def routing_probabilities(router: RouterConfig, logits: Tensor) -> Tensor:
    """Scores as a distribution over experts: softmax, or sigmoids divided by their sum."""
    if router.score != "sigmoid":
        return logits.softmax(dim=-1)
    scores = logits.sigmoid()
    return scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-20)


def expert_counts(routings: Sequence[Routing], valid_T: Tensor | None = None) -> Tensor:
    """int64 [L, E], detached: how many valid tokens chose each expert; rows sum to N * K.

    Slots that a capacity dropped are counted, for they were chosen. Where experts choose, it is how many they took.
    """
    num_experts = routings[0].logits_TE.shape[-1]
    ids_LTK = torch.stack([routing.expert_ids_TK for routing in routings])
    if routings[0].taken_BCE is not None:
        kept = [routing.kept_TK for routing in routings if routing.kept_TK is not None]
        ids_LTK = ids_LTK.masked_fill(~torch.stack(kept), num_experts)
    elif valid_T is not None:
        ids_LTK = ids_LTK.masked_fill(~valid_T[:, None], num_experts)
    ids_LN = ids_LTK.flatten(1)
    # One column more, for slots that do not count: a fixed shape, as compilers need.
    counts = torch.zeros(len(routings), num_experts + 1, dtype=torch.int64, device=ids_LN.device)
    return counts.scatter_add_(1, ids_LN, torch.ones_like(ids_LN))[:, :num_experts]


def balance_losses(
    router: RouterConfig, logits_LTE: Tensor, counts_LE: Tensor, valid_T: Tensor | None = None
) -> Tensor:
    """Load balancing loss of each layer [L]: E * sum_e f_e * P_e (Switch, arXiv:2101.03961, equation 4).

    f_e is the share of assignments that went to expert e and P_e the mean probability of it, over the valid
    tokens of this micro-batch. Both sum to 1, so the loss is 1 for an even load and E / K when the same K
    experts get everything with certainty. Only P carries a gradient.
    """
    probs_LE = _mean_over_tokens(routing_probabilities(router, logits_LTE), valid_T)
    shares_LE = counts_LE / counts_LE.sum(dim=-1, keepdim=True).clamp_min(1)
    return counts_LE.shape[-1] * (shares_LE * probs_LE).sum(dim=-1)


def sequence_balance_losses(
    router: RouterConfig,
    logits_LTE: Tensor,
    routings: Sequence[Routing],
    batch_size: int,
    valid_T: Tensor | None = None,
) -> Tensor:
    """The same loss within each sequence, [L], mean over sequences with a valid token (DeepSeek-V3, equation 17).

    A micro-batch can be even while each of its sequences is not; this loss sees it.
    """
    logits_BLSE = logits_LTE.unflatten(1, (batch_size, -1)).transpose(0, 1)
    valid_BS = None if valid_T is None else valid_T.view(batch_size, -1)
    losses = []
    for b, logits_LSE in enumerate(logits_BLSE):
        rows = slice(b * logits_LSE.shape[1], (b + 1) * logits_LSE.shape[1])
        valid_S = None if valid_BS is None else valid_BS[b]
        counts_LE = expert_counts([_rows_of(routing, rows) for routing in routings], valid_S)
        losses.append(balance_losses(router, logits_LSE, counts_LE, valid_S))
    losses_LB = torch.stack(losses, dim=1)
    if valid_BS is None:
        return losses_LB.mean(dim=1)
    present_B = valid_BS.any(dim=1).to(losses_LB.dtype)
    return losses_LB @ present_B / present_B.sum().clamp_min(1)


def _rows_of(routing: Routing, rows: slice) -> Routing:
    kept_TK = None if routing.kept_TK is None else routing.kept_TK[rows]
    parts = (routing.logits_TE[rows], routing.weights_TK[rows], routing.expert_ids_TK[rows])
    return Routing(*parts, kept_TK, routing.taken_BCE)


def z_losses(logits_LTE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Router z-loss of each layer [L]: mean of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906, equation 5)."""
    return _mean_over_tokens(logits_LTE.logsumexp(dim=-1)[..., None] ** 2, valid_T).squeeze(-1)


def _mean_over_tokens(values_LTX: Tensor, valid_T: Tensor | None) -> Tensor:
    if valid_T is None:
        return values_LTX.mean(dim=1)
    weights_T = valid_T.to(values_LTX.dtype)
    return torch.einsum("ltx,t->lx", values_LTX, weights_T) / weights_T.sum().clamp_min(1)
