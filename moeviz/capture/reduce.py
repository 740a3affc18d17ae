"""Tensors of a micro-batch to sums per expert and per layer, on the device, without waiting for it.

Everything is a sum over valid tokens, so that micro-batches and ranks add up. Definitions (metrics C1 to
C8): z raw logits in float32; p the normalised scores, softmax(z), or for sigmoid gates s / sum(s) with s =
sigmoid(z) (DeepSeek-V3, eq. 18); the score that ranks experts is s, or p for softmax gates, plus the
selection bias.

Shapes: L layers that share E and K, T tokens of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moeviz.capture.reading import Reading
from moeviz.records import ScoreFunction

TOKEN_SUMS = ("entropy_nats", "lse_squared", "confidence", "margin")
"""Names of the rows of `RoutingSums.token_sums_NL`."""


class RoutingSums(NamedTuple):
    """Sums over the valid tokens of a micro-batch, for L layers."""

    counts_LE: Tensor
    """int64, before any capacity drop."""
    dropped_LE: Tensor
    """int64; zeros for dropless layers."""
    prob_sum_LE: Tensor
    weight_sum_LE: Tensor
    token_sums_NL: Tensor
    """float32, rows as in TOKEN_SUMS; NaN where a quantity has no meaning."""


class Decisions(NamedTuple):
    """The readings of L layers, stacked."""

    logits_LTE: Tensor
    """float32."""
    weights_LTK: Tensor
    """float32."""
    expert_ids_LTK: Tensor
    """int64."""
    dropped_LTK: Tensor | None
    unused_LTK: Tensor | None
    counts_LE: Tensor | None


class Scores(NamedTuple):
    """Scores of L layers, [L, T, E] and [L, T]."""

    ranking_LTE: Tensor
    """What ranks the experts, without selection bias; for softmax gates the same tensor as `probs_LTE`."""
    probs_LTE: Tensor
    top_prob_LT: Tensor
    entropy_LT: Tensor
    lse_LT: Tensor


def stack(readings: Sequence[Reading]) -> Decisions:
    """Put the readings of layers with equal T, E and K on top of each other."""

    def together(parts: Sequence[Tensor | None]) -> Tensor | None:
        known = [part for part in parts if part is not None]
        return torch.stack(known) if len(known) == len(parts) else None

    return Decisions(
        torch.stack([reading.logits_TE for reading in readings]).float(),
        torch.stack([reading.weights_TK for reading in readings]).float(),
        torch.stack([reading.expert_ids_TK for reading in readings]).long(),
        together([reading.dropped_TK for reading in readings]),
        together([reading.unused_TK for reading in readings]),
        together([reading.counts_E for reading in readings]),
    )


def scores_of(logits_LTE: Tensor, score: ScoreFunction) -> Scores:
    """Scores, their entropy in nats, and logsumexp of the logits. Every kind but sigmoid ranks by softmax."""
    top_LT1 = logits_LTE.amax(-1, keepdim=True)
    if score == "sigmoid":
        log_LTE = F.logsigmoid(logits_LTE)
        ranking_LTE = log_LTE.exp()
        total_LT1 = ranking_LTE.sum(-1, keepdim=True)
        probs_LTE = ranking_LTE / total_LT1
        entropy_LT = total_LT1.squeeze(-1).log() - (probs_LTE * log_LTE).sum(-1)
        top_prob_LT = (top_LT1.sigmoid() / total_LT1).squeeze(-1)
        return Scores(ranking_LTE, probs_LTE, top_prob_LT, entropy_LT, logits_LTE.logsumexp(-1))
    # One exponential for softmax and logsumexp; on a CPU with few experts five times faster than softmax().
    below_LTE = logits_LTE - top_LT1
    probs_LTE = below_LTE.exp()
    total_LT1 = probs_LTE.sum(-1, keepdim=True)
    probs_LTE.div_(total_LT1)
    total_LT = total_LT1.squeeze(-1)
    entropy_LT = total_LT.log() - (probs_LTE * below_LTE).sum(-1)
    return Scores(probs_LTE, probs_LTE, 1 / total_LT, entropy_LT, top_LT1.squeeze(-1) + total_LT.log())


def selection_margin(ranking_LTE: Tensor, bias_LE: Tensor | None, expert_ids_LTK: Tensor) -> Tensor:
    """Score of the last selected expert minus that of the best unselected one, bias included, [L, T].

    Overwrites `ranking_LTE`: the largest tensor here is not copied.
    """
    if bias_LE is not None:
        ranking_LTE += bias_LE[:, None, :]
    selected_LT = ranking_LTE.gather(-1, expert_ids_LTK).amin(-1)
    return selected_LT - ranking_LTE.scatter_(-1, expert_ids_LTK, float("-inf")).amax(-1)


def sum_decisions(
    decisions: Decisions,
    score: ScoreFunction,
    bias_LE: Tensor | None = None,
    valid_T: Tensor | None = None,
    ranked: bool = True,
) -> RoutingSums:
    """Sum the decisions of L layers over the tokens that count.

    Args:
        decisions: stacked readings.
        score: how logits become scores.
        bias_LE: selection bias, float32.
        valid_T: bool, False at padding; None: all tokens count.
        ranked: whether the K experts are the best by score and bias; False makes the margin NaN.
    """
    num_experts, top_k = decisions.logits_LTE.shape[-1], decisions.expert_ids_LTK.shape[-1]
    counts_LE, dropped_LE, weight_sum_LE = _assignments(decisions, num_experts, valid_T)
    scores = scores_of(decisions.logits_LTE, score)
    prob_sum_LE = _over_tokens(scores.probs_LTE, valid_T)
    if ranked and top_k < num_experts:
        margin_LT = selection_margin(scores.ranking_LTE, bias_LE, decisions.expert_ids_LTK)
    else:
        margin_LT = torch.full_like(scores.lse_LT, float("nan"))
    per_token = [scores.entropy_LT, scores.lse_LT.square(), scores.top_prob_LT, margin_LT]
    token_sums_NL = _over_tokens(torch.stack(per_token, dim=-1), valid_T).T
    return RoutingSums(counts_LE, dropped_LE, prob_sum_LE, weight_sum_LE, token_sums_NL)


def _over_tokens(values_LTX: Tensor, valid_T: Tensor | None) -> Tensor:
    """Sum over the tokens that count, [L, X]. Padding is skipped, not multiplied by 0: it may hold NaN."""
    if valid_T is not None:
        values_LTX = values_LTX.masked_fill(~valid_T[:, None], 0.0)
    return values_LTX.sum(1)


def _assignments(
    decisions: Decisions, num_experts: int, valid_T: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(counts, dropped, sum of gate weights) per expert, by scatter_add_: bincount would wait for CUDA."""
    ids_LTK, weights_LTK = decisions.expert_ids_LTK, decisions.weights_LTK
    num_layers = ids_LTK.shape[0]
    first_L = torch.arange(num_layers, device=ids_LTK.device) * num_experts
    bins = (ids_LTK + first_L[:, None, None]).flatten()
    one_LTK = torch.ones_like(ids_LTK)
    if valid_T is not None:
        one_LTK = one_LTK * valid_T[:, None]
        weights_LTK = weights_LTK.masked_fill(~valid_T[:, None], 0.0)
    if decisions.unused_LTK is not None:
        one_LTK = one_LTK * ~decisions.unused_LTK

    def per_expert(values_LTK: Tensor) -> Tensor:
        sums = values_LTK.new_zeros(num_layers * num_experts)
        return sums.scatter_add_(0, bins, values_LTK.flatten()).view(num_layers, num_experts)

    if decisions.counts_LE is not None and valid_T is None:
        counts_LE = decisions.counts_LE.long()
    else:
        counts_LE = per_expert(one_LTK)
    if decisions.dropped_LTK is not None:
        dropped_LE = per_expert(one_LTK * decisions.dropped_LTK)
    else:
        dropped_LE = torch.zeros_like(counts_LE)
    return counts_LE, dropped_LE, per_expert(weights_LTK)
