"""Check on real decisions what an adapter claims about a router: its score function, and that the best K win.

Gate weights are the scores of the chosen experts times a factor per token, whether normalised, scaled or
neither. So the ratio of weight to score is constant over the slots of a token for the right score function,
and only for it. Looked at once, on the first micro-batch: this waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeviz.capture.reduce import Decisions, scores_of, selection_margin
from moeviz.capture.sampling import selection_scores
from moeviz.records import ScoreFunction

_AGREES = 0.02
"""Relative spread of the ratio that rounding to bfloat16 explains."""
_DECIDES = 8.0
"""How much better than the other one a score function must fit to overrule the adapter."""
_ENOUGH_TOKENS = 64
"""Slots of this many tokens are not in order by chance."""
_TIE = 1e-3
"""A margin this far below 0 is not a tie or a rounding error."""


def score_of(decisions: Decisions, claimed: ScoreFunction) -> ScoreFunction:
    """The score function that explains the gate weights, or `claimed` where the weights do not tell."""
    kind: ScoreFunction = "sigmoid" if claimed == "sigmoid" else "softmax"
    other: ScoreFunction = "softmax" if kind == "sigmoid" else "sigmoid"
    misfit, misfit_other = _misfit(decisions, kind), _misfit(decisions, other)
    if misfit_other < _AGREES and misfit_other * _DECIDES < misfit:
        return other
    return claimed


def _misfit(decisions: Decisions, score: ScoreFunction) -> float:
    """Relative spread of weight / score over the slots of a token, 90th percentile over tokens."""
    ranking_LTE = scores_of(decisions.logits_LTE, score).ranking_LTE
    ratio_LTK = decisions.weights_LTK / ranking_LTE.gather(-1, decisions.expert_ids_LTK).clamp(min=1e-20)
    if ratio_LTK.shape[-1] == 1:  # one slot: its weight tells something only if it was not normalised to 1
        ratio_LTK = ratio_LTK.transpose(-1, -2)
        if bool((decisions.weights_LTK == decisions.weights_LTK.flatten()[0]).all()):
            return 0.0
    spread = (ratio_LTK.amax(-1) - ratio_LTK.amin(-1)) / ratio_LTK.mean(-1).clamp(min=1e-20)
    return float(torch.quantile(spread.flatten()[:100_000], 0.9))


def is_ranked(decisions: Decisions, score: ScoreFunction, bias_LE: Tensor | None) -> bool:
    """Whether every token chose its K best experts: with groups, hashing or noise a margin means nothing."""
    if decisions.expert_ids_LTK.shape[-1] == decisions.logits_LTE.shape[-1]:
        return True
    ranking_LTE = scores_of(decisions.logits_LTE, score).ranking_LTE
    return bool((selection_margin(ranking_LTE, bias_LE, decisions.expert_ids_LTK) > -_TIE).all())


def is_ordered(decisions: Decisions, score: ScoreFunction, bias_LE: Tensor | None) -> bool:
    """Whether the router puts the slots of a token by falling selection score; with few tokens, nobody knows."""
    rank_LTK = selection_scores(decisions, score, bias_LE)
    enough = rank_LTK.shape[0] * rank_LTK.shape[1] >= _ENOUGH_TOKENS
    return enough and bool((rank_LTK.diff(dim=-1) <= 0).all())
