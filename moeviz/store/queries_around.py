"""Questions about a window of steps: what was true around the moment at which something happened."""

from __future__ import annotations

import numpy as np
import pandas as pd

from moeviz.alerts import latest
from moeviz.records import AlertRecord
from moeviz.store.queries_series import alert_transitions
from moeviz.store.reader import Store


def scalars_around(store: Store, step: int, first: int, last: int) -> pd.DataFrame:
    """Scalars in steps first..last, mean over ranks.

    Returns: name, value (at the recorded step nearest to `step`), at_step (that step), before (mean over the
    steps before `step`, NULL without one), after (likewise), lowest, highest; ordered by name.
    """
    return store.frame(
        lambda: (
            f"""
        WITH rows AS (SELECT name, step, avg(value) AS value FROM {store.source("scalars", first, last)}
            WHERE step BETWEEN $first AND $last GROUP BY name, step)
        {_SUMMARY.format(by="name")} ORDER BY name"""
        ),
        {"step": step, "first": first, "last": last},
    )


def scalar_values(store: Store, name: str, last: int) -> np.ndarray:
    """A scalar at every recorded step up to `last`, mean over ranks, in step order; float64, without NaN."""
    found = store.frame(
        lambda: (
            f"""SELECT avg(value) AS value FROM {store.source("scalars", 0, last)}
        WHERE name = $name AND step <= $last AND NOT isnan(value) GROUP BY step ORDER BY step"""
        ),
        {"name": name, "last": last},
    )
    return found["value"].to_numpy(dtype=np.float64)


def metrics_around(store: Store, step: int, first: int, last: int) -> pd.DataFrame:
    """Derived metrics in steps first..last.

    Returns: name, layer (NULL for run-level values), and value, at_step, before, after, lowest, highest as in
    `scalars_around`; ordered by name and layer.
    """
    return store.frame(
        lambda: (
            f"""
        WITH rows AS (SELECT name, layer::INTEGER AS layer, step, avg(value) AS value
            FROM {store.source("metrics", first, last)}
            WHERE step BETWEEN $first AND $last GROUP BY name, layer, step)
        {_SUMMARY.format(by="name, layer")} ORDER BY name, layer NULLS FIRST"""
        ),
        {"step": step, "first": first, "last": last},
    )


_SUMMARY = """
        SELECT {by}, arg_min(rows.value, abs(step - $step)) AS value, arg_min(step, abs(step - $step)) AS at_step,
               avg(rows.value) FILTER (step < $step) AS before, avg(rows.value) FILTER (step > $step) AS after,
               min(rows.value) AS lowest, max(rows.value) AS highest
        FROM rows GROUP BY {by}"""


def alerts_around(store: Store, first: int, last: int) -> tuple[AlertRecord, ...]:
    """State, as of step `last`, of every alert that was open at some time in first..last; open ones first."""
    states = latest(alert_transitions(store, last=last))
    return tuple(alert for alert in states if alert.cleared_step is None or alert.cleared_step >= first)
