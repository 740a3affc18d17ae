"""The METRICS table, gathered from one file per group."""

from __future__ import annotations

from moeviz.metrics.glossary.decision import DECISIONS
from moeviz.metrics.glossary.load import DROPS, LOAD
from moeviz.metrics.glossary.losses import LOSSES
from moeviz.metrics.metric import Metric

METRICS: tuple[Metric, ...] = LOAD + DROPS + LOSSES + DECISIONS
"""Every quantity by group; `by_id` finds one."""


def by_id(metric_id: str) -> Metric:
    """The row of METRICS with this id. Raises KeyError for an unknown one."""
    return {metric.id: metric for metric in METRICS}[metric_id]


def live_ids() -> tuple[str, ...]:
    """Ids of the metrics that a run records for every step, in the order of METRICS."""
    return tuple(metric.id for metric in METRICS if metric.live)
