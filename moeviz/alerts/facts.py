"""What an alert about a layer tells: the experts it is about and the numbers that fill its sentences."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeviz.alerts.config import AlertConfig
from moeviz.alerts.load_rules import LoadView
from moeviz.alerts.router_rules import RouterCourse
from moeviz.alerts.statistics import LoadStatistics

_NAMED = 8
"""Experts that a sentence names at most, after the first."""


def experts_of(rule_id: str, layer: int, statistics: LoadStatistics, config: AlertConfig) -> tuple[int, ...]:
    """The experts that a rule is about in a layer, worst first.

    Empty for rules about the layer as a whole.
    """
    mean_E = statistics.mean_LE[layer, : statistics.num_experts_L[layer]]
    if rule_id in ("LOAD_SKEW", "ROUTING_COLLAPSE"):
        return (int(mean_E.argmax()),)
    lines = {"EXPERT_STARVED": statistics.starved_line_L[layer], "EXPERT_DEAD": config.dead_line}
    if rule_id not in lines:
        return ()
    below = np.flatnonzero(mean_E < lines[rule_id])
    return tuple(below[np.argsort(mean_E[below], kind="stable")].tolist())


def layer_facts(
    layer: int,
    experts: tuple[int, ...],
    statistics: LoadStatistics,
    view: LoadView,
    routers: RouterCourse,
    t: int,
) -> dict[str, Any]:
    """Fields of the messages and remedies of `rules.RULES` that describe a layer, after record `t` of the course."""
    num_experts, top_k = int(statistics.num_experts_L[layer]), int(statistics.top_k_L[layer])
    mean_E = statistics.mean_LE[layer, :num_experts]
    lowest, busiest = int(mean_E.argmin()), int(mean_E.argmax())
    u, span = float(routers.bias_step_TL[t, layer]), float(routers.bias_span_TL[t, layer])
    known = np.isfinite(u) and u > 0
    return {
        "layer": layer,
        "num_experts": num_experts,
        "n_eff": float(view.n_eff_L[layer]),
        "eff_util": float(view.util_L[layer]),
        "excess_cov": float(view.excess_L[layer]),
        "design_effect": float(statistics.design_effect_L[layer]),
        "lowest": lowest,
        "lowest_share": float(mean_E[lowest]) / num_experts,
        "busiest": busiest,
        "busiest_coverage": float(mean_E[busiest]) * top_k / num_experts,
        "others": others(experts),
        "expected_drop": float(routers.expected_drop_TL[t, layer]),
        "swing_cause": _swing_cause(u if known else None, np.isfinite(span)),
        "bias_lead": f", {span / u:.0f} updates of u = {u:.2g}" if known and np.isfinite(span) else "",
        "name": "A router sum",
        "where": f" in layer {layer}",
    }


def _swing_cause(bias_step: float | None, has_bias: bool) -> str:
    if bias_step is not None:
        return f"the bias step u = {bias_step:.2g} is too large for this batch"
    if has_bias:
        return "the bias step is too large for this batch"
    return "balancing over-corrects, or batches alternate between kinds of data"


def others(experts: tuple[int, ...]) -> str:
    """What a sentence about the first of `experts` adds about the rest: `.

    So are experts 3, 5 and 2 more`.
    """
    rest = experts[1 : 1 + _NAMED]
    if not rest:
        return ""
    named = ", ".join(map(str, rest))
    unnamed = len(experts) - 1 - len(rest)
    more = f" and {unnamed} more" if unnamed else ""
    return f"; so is expert {named}" if len(rest) == 1 else f"; so are experts {named}{more}"
