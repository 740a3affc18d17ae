"""Questions about numbers over steps (metrics, scalars) and about what happened (alerts, events)."""

from __future__ import annotations

from collections.abc import Sequence

import orjson
import pandas as pd

from moeviz.records import AlertRecord
from moeviz.store.reader import Store
from moeviz.store.schema import EXPERT_LOAD, MEANS

_MEAN_DOCS = {column.name: column.doc for column in EXPERT_LOAD.columns if column.name in MEANS.values()}


def metric_names(store: Store) -> list[str]:
    """Every name that `metric_over_time` answers for in this run, sorted."""
    names = store.frame(lambda: f"SELECT DISTINCT name FROM {store.source('metrics')}")["name"]
    counts = ", ".join(f"count({name}) AS {name}" for name in _MEAN_DOCS)
    recorded = store.frame(lambda: f"SELECT {counts} FROM {store.source('expert_load')}").iloc[0]
    return sorted({*names, *(name for name in _MEAN_DOCS if recorded[name] > 0)})


def metric_over_time(store: Store, name: str, layer: int | None = None, points: int = 500) -> pd.DataFrame:
    """One metric over steps, mean per bucket, at most about `points` per layer.

    Args:
        name: one of `metric_names`; the means in expert_load (entropy_nats, z_loss ...) count as metrics.
        layer: one MoE layer, or None for all layers and the run-level series.

    Returns: step (first of the bucket), layer (NULL for run-level values), value; ordered by layer and step.
    """
    where = "" if layer is None else f"AND layer = {int(layer)}"

    def build() -> str:
        stored = f"SELECT step, layer, value FROM {store.source('metrics')} WHERE name = $name {where}"
        if name in _MEAN_DOCS:
            means = f"SELECT step, layer, {name}::DOUBLE FROM {store.source('expert_load')}"
            stored += f" UNION ALL {means} WHERE {name} IS NOT NULL {where}"
        return f"""
        WITH rows AS ({stored}), edge AS (SELECT min(step) AS lo, max(step) AS hi FROM rows),
        bucketed AS (SELECT (step - lo) // greatest(1, ceil((hi - lo + 1) / $points)::INTEGER) AS bucket,
                            step, layer, value FROM rows, edge)
        SELECT min(step)::INTEGER AS step, layer::INTEGER AS layer, avg(value) AS value
        FROM bucketed GROUP BY bucket, layer ORDER BY layer NULLS FIRST, step"""

    return store.frame(build, {"name": name, "points": max(points, 1)})


def scalars(store: Store, names: Sequence[str] | None = None, points: int = 1000) -> pd.DataFrame:
    """Scalars over steps, mean per bucket and over ranks, at most about `points` per name.

    Args:
        names: which ones; None for all.

    Returns: step (first of the bucket), name, value; ordered by name and step.
    """
    where = "" if names is None else "WHERE list_contains($names, name)"
    params: dict[str, object] = {"points": max(points, 1)}
    if names is not None:
        params["names"] = list(names)
    return store.frame(
        lambda: (
            f"""
        WITH rows AS (SELECT step, name, value FROM {store.source("scalars")} {where}),
        bucketed AS (SELECT step, name, value, (step - min(step) OVER one)
                // greatest(1, ceil((max(step) OVER one - min(step) OVER one + 1) / $points)::INTEGER)
                AS bucket
            FROM rows WINDOW one AS (PARTITION BY name))
        SELECT min(step)::INTEGER AS step, name, avg(value) AS value
        FROM bucketed GROUP BY bucket, name ORDER BY name, step"""
        ),
        params,
    )


def alerts(store: Store, open_only: bool = False) -> pd.DataFrame:
    """The newest state of every alert episode.

    Returns: the columns of the alerts table without ts (`step` is that of the last transition, `experts` an
    array, `evidence` JSON); open episodes first, worst first, then cleared ones, newest first.
    """
    where = "WHERE cleared_step IS NULL" if open_only else ""
    return store.frame(
        lambda: (
            f"""
        WITH newest AS (SELECT * EXCLUDE (ts) FROM {store.source("alerts")}
            QUALIFY row_number() OVER (PARTITION BY episode ORDER BY ts DESC) = 1)
        SELECT * FROM newest {where}
        ORDER BY cleared_step IS NOT NULL, list_position(['critical', 'error', 'warning', 'info'], severity),
                 step DESC, episode"""
        )
    )


def alert_records(store: Store) -> tuple[AlertRecord, ...]:
    """`alerts` as records, for views that share code with live alerting."""
    return _records(alerts(store))


def alert_transitions(
    store: Store, first: int | None = None, last: int | None = None
) -> tuple[AlertRecord, ...]:
    """Every transition of every alert in steps first..last (inclusive), in the order in which they happened."""
    lowest, highest = -1 if first is None else first, (1 << 31) - 1 if last is None else last
    return _records(
        store.frame(
            lambda: (
                f"""SELECT * FROM {store.source("alerts", lowest, highest)}
            WHERE step BETWEEN ? AND ? ORDER BY ts, step, episode"""
            ),
            [lowest, highest],
        )
    )


def _records(rows: pd.DataFrame) -> tuple[AlertRecord, ...]:
    return tuple(
        AlertRecord(
            episode=row.episode,
            rule=row.rule,
            rule_version=int(row.rule_version),
            layer=None if pd.isna(row.layer) else int(row.layer),
            experts=tuple(int(expert) for expert in row.experts) if row.experts is not None else (),
            severity=row.severity,
            raised_step=int(row.raised_step),
            updated_step=int(row.step),
            cleared_step=None if pd.isna(row.cleared_step) else int(row.cleared_step),
            value=float(row.value),
            peak=float(row.peak),
            threshold=float(row.threshold),
            message=row.message,
            remedy=row.remedy,
            evidence=orjson.loads(row.evidence),
        )
        for row in rows.itertuples()
    )


def events(store: Store) -> pd.DataFrame:
    """What happened to the run. Returns: step, rank, ts, kind, detail (JSON); ordered by time."""
    return store.frame(
        lambda: f"SELECT step, rank, ts, kind, detail FROM {store.source('events')} ORDER BY ts, step"
    )


def dropped_samples(store: Store) -> int:
    """How many samples the recorder gave up so far because training was faster than the disk."""
    value = store.frame(
        lambda: (
            f"""SELECT sum((detail->>'samples')::BIGINT) AS dropped FROM {store.source("events")}
        WHERE kind = 'dropped_samples'"""
        )
    )["dropped"].iloc[0]
    return 0 if pd.isna(value) else int(value)


def sampling_level(store: Store) -> int:
    """Halvings of the sampling by which a budget keeps to its limits now; 0: everything that the policy asks for."""
    value = store.frame(
        lambda: (
            f"""SELECT max(level) AS level FROM (
        SELECT arg_max(coalesce((detail->>'level')::INTEGER, 0), ts) AS level FROM {store.source("events")}
        WHERE kind IN ('sampling', 'resumed') GROUP BY rank)"""
        )
    )["level"].iloc[0]
    return 0 if pd.isna(value) else int(value)
