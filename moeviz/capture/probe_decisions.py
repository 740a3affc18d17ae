"""How decided routers are about the tokens of the fixed probe: what the sums of a training step do not hold.

The definitions are those of `moeviz.metrics.decision`, as tensors on the device; a test holds the two together. The
live series of training (`route_entropy`, `route_conf`, `margin` ...) are means over other tokens at every step.

Shapes: L layers that share E and K, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeviz.capture.reduce import Decisions, selection_margin
from moeviz.records import ScoreFunction

DECISION_VALUES = (
    "margin12",
    "margin12_logits",
    "probe_margin",
    "gate_eff",
    "gate_mass",
    "logit_rms",
    "logit_max",
    "lse_mean",
)
"""Metrics that `decision_values` gives, in the order of its rows."""
_TIE = 1e-3
"""A margin this far below 0 is not a tie or a rounding error."""


def decision_values(
    decisions: Decisions,
    score: ScoreFunction,
    probs_LTE: Tensor,
    bias_LE: Tensor | None = None,
    valid_T: Tensor | None = None,
) -> Tensor:
    """float32 [len(DECISION_VALUES), L], means over valid tokens (`logit_max`: the largest of them).

    NaN where a layer has no such thing: margins of one expert, a selection margin where every expert is chosen or the
    best do not win.

    Args:
        probs_LTE: normalised scores.
        bias_LE: of the selection, in the units that the router ranks by: logits for softmax_topk, else scores.
    """
    logits_LTE, weights_LTK, ids_LTK = (
        decisions.logits_LTE.float(),
        decisions.weights_LTK,
        decisions.expert_ids_LTK,
    )
    if valid_T is not None:
        logits_LTE, probs_LTE, weights_LTK, ids_LTK = (
            values[:, valid_T] for values in (logits_LTE, probs_LTE, weights_LTK, ids_LTK)
        )
    top_k = ids_LTK.shape[-1]
    unit_LTK = weights_LTK.float() / weights_LTK.float().sum(dim=-1, keepdim=True)
    means = (
        _lead(probs_LTE),
        _lead(logits_LTE),
        _selection(logits_LTE, score, bias_LE, ids_LTK),
        1 / unit_LTK.square().sum(dim=-1),
        probs_LTE.float().topk(top_k, dim=-1).values.sum(dim=-1),
        logits_LTE.square().mean(dim=-1),
        logits_LTE.abs().amax(dim=-1),
        logits_LTE.logsumexp(dim=-1),
    )
    table_RL = torch.stack([values_LT.nanmean(dim=-1) for values_LT in means])
    table_RL[DECISION_VALUES.index("logit_rms")].sqrt_()
    table_RL[DECISION_VALUES.index("logit_max")] = means[DECISION_VALUES.index("logit_max")].amax(dim=-1)
    return table_RL


def _lead(values_LTE: Tensor) -> Tensor:
    """How far the largest value of a token is above the second, [L, T]; NaN for a single one."""
    if values_LTE.shape[-1] < 2:
        return values_LTE.new_full(values_LTE.shape[:-1], float("nan")).float()
    first_LT, second_LT = values_LTE.float().topk(2, dim=-1).values.unbind(dim=-1)
    return first_LT - second_LT


def _selection(logits_LTE: Tensor, score: ScoreFunction, bias_LE: Tensor | None, ids_LTK: Tensor) -> Tensor:
    """What decides who is chosen: the last chosen expert's rank over that of the best other, bias included, [L, T]."""
    if ids_LTK.shape[-1] == logits_LTE.shape[-1]:
        return logits_LTE.new_full(logits_LTE.shape[:-1], float("nan"))
    if score == "softmax_topk":
        ranking_LTE = logits_LTE.clone()
    else:
        ranking_LTE = logits_LTE.sigmoid() if score == "sigmoid" else logits_LTE.softmax(dim=-1)
    margin_LT = selection_margin(ranking_LTE, bias_LE, ids_LTK)
    ranked_L1 = (margin_LT > -_TIE).all(dim=-1, keepdim=True)  # groups or a hash choose otherwise
    return margin_LT.masked_fill(~ranked_L1, float("nan"))
