"""The METRICS table, gathered from one file per group."""

from __future__ import annotations

from moeviz.metrics.glossary.attention import ATTENTION, LATENT
from moeviz.metrics.glossary.decision import DECISIONS
from moeviz.metrics.glossary.experts import GRADIENTS, IMPORTANCE, SIMILARITY
from moeviz.metrics.glossary.load import DROPS, LOAD
from moeviz.metrics.glossary.losses import LOSSES
from moeviz.metrics.glossary.tokens import CHANGE, COACTIVATION, PATHS, SPECIALIZATION
from moeviz.metrics.metric import Metric

GROUPS: dict[str, tuple[Metric, ...]] = {
    "load": LOAD,
    "drops": DROPS,
    "losses": LOSSES,
    "decision": DECISIONS,
    "change": CHANGE,
    "co-activation": COACTIVATION,
    "specialisation": SPECIALIZATION,
    "paths": PATHS,
    "similarity": SIMILARITY,
    "importance": IMPORTANCE,
    "attention": ATTENTION,
    "latent attention": LATENT,
    "gradients": GRADIENTS,
}
"""Rows of METRICS by what they describe."""

METRICS: tuple[Metric, ...] = tuple(metric for group in GROUPS.values() for metric in group)
"""Every quantity; `by_id` finds one."""


_BY_ID = {metric.id: metric for metric in METRICS}


def by_id(metric_id: str) -> Metric:
    """The row of METRICS with this id. Raises KeyError for an unknown one."""
    return _BY_ID[metric_id]


def live_ids() -> tuple[str, ...]:
    """Ids of the metrics that a run records for every step, in the order of METRICS."""
    return tuple(metric.id for metric in METRICS if metric.live)
