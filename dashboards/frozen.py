"""The live page at a step of the past: the same snapshot, made from history instead of from the newest rows."""

from __future__ import annotations

from dataclasses import replace

from moeviz.live import Series, Snapshot
from moeviz.records import AlertRecord
from moeviz.store.load_ring import LoadRing
from moeviz.store.queries import load_history
from moeviz.store.reader import Store

HISTORY = 240
"""Steps before the chosen one that the entropy rows show, as many as a live feed keeps."""


def frozen(store: Store, latest: Snapshot, step: int) -> Snapshot:
    """`latest` as it was at `step`: loads, histories, scalars and alerts of then, the run's state of now."""
    ring = LoadRing(latest.info, HISTORY)
    ring.extend(load_history(store, max(0, step - HISTORY + 1), step))
    return replace(
        latest,
        revision=-1 - step,
        step=ring.step,
        tokens=ring.tokens,
        load_rel_LE=ring.load_rel_LE,
        load_rel_ema_LE=ring.load_rel_ema_LE,
        history_steps_T=ring.steps_T,
        load_entropy_TL=ring.load_entropy_TL,
        route_entropy_TL=ring.route_entropy_TL,
        max_load_TL=ring.max_load_TL,
        n_eff_L=ring.n_eff_L,
        drop_rate_L=ring.drop_rate_L,
        scalars={name: _until(series, step) for name, series in latest.scalars.items()},
        alerts=tuple(_at(alert, step) for alert in latest.alerts if alert.raised_step <= step),
    )


def _until(series: Series, step: int) -> Series:
    kept = series.steps <= step
    return Series(steps=series.steps[kept], values=series.values[kept])


def _at(alert: AlertRecord, step: int) -> AlertRecord:
    """An episode that was cleared later was still open then."""
    still_open = alert.cleared_step is not None and alert.cleared_step > step
    return replace(alert, cleared_step=None) if still_open else alert
