"""Which sequences of a step are recorded token by token, and the rows cut out of the stacked decisions.

The choice is made before a micro-batch runs, from its number alone: it costs nothing and needs no random
state of the training. It moves with the step, so that a loader with a fixed order does not show the same
rows for ever.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from moeviz.capture.reduce import Decisions
from moeviz.records import ScoreFunction

_GOLDEN = 0.6180339887498949


def choose_rows(
    first: int, batch_size: int, expected: int, wanted: int | Literal["all"], step: int, taken: int = 0
) -> list[int]:
    """Rows of a micro-batch that are recorded, so that a step records `wanted` sequences spread over all of it.

    Args:
        first: sequences of the step before this micro-batch.
        batch_size: sequences of this micro-batch.
        expected: sequences of the whole step: as many as the step before had, at least those known of now.
        wanted: sequences to record per step.
        step: turns the choice, so that other rows come next time.
        taken: sequences of the step recorded so far; a step never records more than `wanted`.
    """
    if wanted == "all":
        return list(range(batch_size))
    total = max(expected, first + batch_size)
    count = min(wanted, total)
    start = (step * _GOLDEN) % 1.0
    chosen = {int((start + index / count) % 1.0 * total) for index in range(count)}
    rows = sorted(seq - first for seq in chosen if first <= seq < first + batch_size)
    return rows[: max(0, wanted - taken)]


def selection_scores(decisions: Decisions, score: ScoreFunction, bias_LE: Tensor | None) -> Tensor:
    """What ranked the chosen experts, up to a monotone map, [L, T, K]."""
    ids_LTK = decisions.expert_ids_LTK
    if decisions.unused_LTK is not None:
        return decisions.logits_LTE.gather(-1, ids_LTK).masked_fill(decisions.unused_LTK, float("-inf"))
    if bias_LE is None:  # softmax and sigmoid keep the order of the logits
        return decisions.logits_LTE.gather(-1, ids_LTK)
    if score == "sigmoid":
        chosen_LTK = decisions.logits_LTE.gather(-1, ids_LTK).sigmoid()
    elif score == "softmax_topk":  # ranks by logits, and its bias is in their units
        chosen_LTK = decisions.logits_LTE.gather(-1, ids_LTK)
    else:
        chosen_LTK = decisions.logits_LTE.softmax(-1).gather(-1, ids_LTK)
    return chosen_LTK + bias_LE[:, None, :].expand(-1, ids_LTK.shape[1], -1).gather(-1, ids_LTK)


def cut_rows(
    decisions: Decisions, rows_N: Tensor, shape: tuple[int, int], rank_LTK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(ids int16, weights) [L, N, S, K] of the chosen rows, slots by falling selection score.

    Args:
        decisions: stacked readings of L layers, T = B*S.
        rows_N: int64 on the device, rising.
        shape: (B, S).
        rank_LTK: `selection_scores`, or None when the slots are in order already.
    """

    def rows(values_LTK: Tensor) -> Tensor:
        values_LBSK = values_LTK.unflatten(1, shape)
        return values_LBSK if len(rows_N) == shape[0] else values_LBSK.index_select(1, rows_N)

    experts_LNSK, weights_LNSK = rows(decisions.expert_ids_LTK), rows(decisions.weights_LTK)
    if rank_LTK is not None:
        order_LNSK = rows(rank_LTK).argsort(dim=-1, descending=True, stable=True)
        experts_LNSK = experts_LNSK.gather(-1, order_LNSK)
        weights_LNSK = weights_LNSK.gather(-1, order_LNSK)
    return experts_LNSK.short(), weights_LNSK
