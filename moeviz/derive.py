"""A Sink that adds what follows from the records: metrics and alerts of every step.

Everything else passes through.

It stands between the probe and whatever writes. It never changes a record, and never loses one: the record
goes on first, and a failure in the derivation is counted and logged once, because a wrong chart must not cost
a training run. Only the training mixture may be fed here: an evaluation set, or one domain alone, looks like
collapse.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import numpy as np

from moeviz.alerts import AlertConfig, LatentDetector, ProbeDetector, RouterDetector, RunPlan, ScalarDetector
from moeviz.alerts.scalars import WATCHED
from moeviz.metrics import layer_shapes, load
from moeviz.metrics.load_block import LoadBlock, alike
from moeviz.probe_history import ProbeHistory
from moeviz.records import (
    AlertRecord,
    LatentRecord,
    LoadRecord,
    MetricRecord,
    ModelInfo,
    ProbeRecord,
    Record,
    ScalarRecord,
    Severity,
    Sink,
)

_log = logging.getLogger(__name__)
_Seen = TypeVar("_Seen")

_BLOCKS = 10
"""Blocks of the window of `maxvio_global`."""
TOGETHER = 64
"""Steps that a recorder judges together at most."""
_ELEMENTS = 2**14
"""Counts [T, L, E] that are judged together at most: larger temporary arrays cost more than the calls that are saved.
At 48 x 256, a third skewed, a block of five took 1.4 times as long a step as one by one."""


class AccumulatedLoad:
    """Counts of about the last `window` records, in blocks, so that it costs one addition a record."""

    def __init__(self, window: int) -> None:
        self._block_records = max(window // _BLOCKS, 1)
        self._blocks: list[np.ndarray] = []
        self._records = 0

    def add(self, counts_LE: np.ndarray) -> np.ndarray:
        """Add the counts of a record; returns the sum over the window, int64 [L, E], which the next call changes."""
        if self._records % self._block_records == 0:
            self._blocks = [*self._blocks[-_BLOCKS + 1 :], np.zeros_like(counts_LE, dtype=np.int64)]
            self._sum_LE = np.sum(self._blocks, axis=0)
        self._blocks[-1] += counts_LE
        self._sum_LE += counts_LE
        self._records += 1
        return self._sum_LE


class DeriveSink:
    """Derives metrics and alerts from LoadRecords and ProbeRecords, alerts from ScalarRecords and LatentRecords."""

    def __init__(
        self,
        inner: Sink,
        info: ModelInfo,
        *,
        plan: RunPlan | None = None,
        config: AlertConfig | None = None,
        global_window: int = 200,
        on_alert: Callable[[AlertRecord], None] | None = None,
        together: int = 1,
    ) -> None:
        """Wrap `inner`.

        Args:
            inner: where all records go.
            info: the watched model; its layers are the rows of every LoadRecord.
            plan: what the alert rules should know about the run (planned steps, warm-up, clipping, capacity).
            config: thresholds of the alert rules.
            global_window: records over which `maxvio_global` accumulates counts.
            on_alert: called when an alert is raised, becomes graver or is cleared, for example to print it in
                the training terminal. What it raises is logged and goes no further.
            together: LoadRecords that are judged together at most, which costs less for each. What follows from a
                record is written by the next `flush` at the latest. Layers of many experts are judged in smaller
                groups.
        """
        self._inner, self._on_alert = inner, on_alert
        self._shapes = layer_shapes(info)
        self._together = max(1, min(together, _ELEMENTS // max(1, info.num_layers * info.max_experts)))
        self._waiting: list[LoadRecord] = []
        """LoadRecords that were passed on and are not judged yet."""
        self._routers = RouterDetector(info, config, plan)
        self._scalars = ScalarDetector(config, plan)
        self._probe = ProbeDetector(config)
        self._latents = LatentDetector(config)
        self._probed = ProbeHistory(info, self._probe.config.head_entropy)
        self._global_window = global_window
        self._accumulated = AccumulatedLoad(global_window)
        self._last_step: dict[type, int] = {}
        self._announced: dict[str, Severity] = {}
        self._told = False
        self.failures = 0
        """Records that nothing could be derived from, because the derivation raised."""

    @property
    def open_alerts(self) -> tuple[AlertRecord, ...]:
        """Latest state of every open episode, as of the records that were judged."""
        detectors = (self._routers, self._scalars, self._probe, self._latents)
        return tuple(alert for detector in detectors for alert in detector.episodes.open_alerts)

    def write(self, record: Record) -> None:
        """Pass `record` on, then write what follows from it. Raises only what `inner` raises."""
        self._inner.write(record)
        self._write_all(self._take(record))

    def flush(self) -> None:
        try:
            self._write_all(self._rest())
        finally:  # a refused metric keeps nothing else from readers
            self._inner.flush()

    def close(self) -> None:
        try:
            self._write_all(self._rest())
        finally:
            self._inner.close()

    def _write_all(self, derived: Iterable[Record]) -> None:
        """Write every record, also after one that `inner` refused; then raise its first refusal."""
        refusal: Exception | None = None
        for record in derived:
            try:
                self._inner.write(record)
            except Exception as error:
                refusal = refusal or error
            if isinstance(record, AlertRecord):
                self._announce(record)
        if refusal is not None:
            raise refusal

    def replay(self, records: Iterable[Record], open_alerts: Iterable[AlertRecord] = ()) -> None:
        """Rebuild the state of an earlier attempt of the run without writing anything.

        Args:
            records: LoadRecords, ScalarRecords and ProbeRecords before the step that training resumes at, oldest
                first.
                About 500 are enough to arm every rule and to fill every window but that of LOAD_DRIFT's
                baseline.
            open_alerts: latest states of the episodes that were open then.
        """
        for record in records:
            self._take(record)
        self._rest()
        alerts = tuple(open_alerts)
        self._routers.restore(alerts)
        self._scalars.restore(alerts)
        self._probe.restore(alerts)
        self._latents.restore(alerts)
        self._announced = {alert.episode: alert.severity for alert in self.open_alerts}

    def _take(self, record: Record) -> list[Record]:
        """What follows from the records so far and was not told yet; LoadRecords may wait for others."""
        if not isinstance(record, LoadRecord):
            return self._guarded(record, self._derive, record)
        if record.tokens <= 0:
            return []
        back = bool(self._waiting) and record.step < self._waiting[-1].step
        derived = self._rest() if back else []
        self._waiting.append(record)
        return [*derived, *self._rest()] if len(self._waiting) >= self._together else derived

    def _rest(self) -> list[Record]:
        """What follows from the records that wait."""
        waiting, self._waiting = self._waiting, []
        return [
            derived
            for group in alike(waiting)
            for derived in self._guarded(group[0], self._from_loads, group)
        ]

    def _guarded(self, record: Record, derive: Callable[[_Seen], list[Record]], seen: _Seen) -> list[Record]:
        try:
            return derive(seen)
        except Exception:
            self.failures += len(seen) if isinstance(seen, list) else 1
            if not self._told:
                self._told = True
                kind, step = type(record).__name__, getattr(record, "step", -1)
                _log.exception("no metrics or alerts derived from the %s of step %d", kind, step)
        return []

    def _derive(self, record: Record) -> list[Record]:
        if isinstance(record, ScalarRecord):
            return [*self._rewound(record, self._scalars), *self._scalars.observe(record)]
        if isinstance(record, ProbeRecord):
            return self._from_probe(record)
        if isinstance(record, LatentRecord):
            return [*self._rewound(record, self._latents), *self._latents.observe(record)]
        return []

    def _from_loads(self, records: list[LoadRecord]) -> list[Record]:
        """Metrics and alerts of records in which training did not go back."""
        rewound = self._rewound(records[0], self._routers)
        self._last_step[LoadRecord] = records[-1].step
        block = LoadBlock.of(records)
        live, alerts_T = self._routers.observe_block(block)
        sums_TLE = np.array([self._accumulated.add(counts_LE).copy() for counts_LE in block.counts_LE])
        live["maxvio_global"] = load.maxvio(load.load_share(sums_TLE), self._shapes[0])
        values = {name: np.asarray(value_TL, dtype=np.float32) for name, value_TL in live.items()}
        derived: list[Record] = []
        for t, (step, alerts) in enumerate(zip(block.steps, alerts_T, strict=True)):
            of_step = {name: value_TL[t] for name, value_TL in values.items()}
            derived += [MetricRecord(step=step, values=of_step), *([] if t else rewound), *alerts]
        return derived

    def _from_probe(self, record: ProbeRecord) -> list[Record]:
        alerts = self._rewound(record, self._probe)
        found = self._probed.observe(record)
        churn_L = found.values.get("churn", np.nan)
        derived: list[Record] = [found, *alerts, *self._probe.observe(record, found)]
        if np.isfinite(churn_L).any():
            values = {"probe_churn": float(np.nanmean(churn_L))}
            derived.append(ScalarRecord(step=record.step, rank=record.rank, ts=record.ts, values=values))
        return derived

    def _rewound(
        self, record: LoadRecord | ScalarRecord | ProbeRecord | LatentRecord, detector: _Detector
    ) -> list[AlertRecord]:
        """Close what belongs to steps that training went back behind (a checkpoint was loaded)."""
        if isinstance(record, ScalarRecord) and not WATCHED & record.values.keys():
            return []  # an evaluation may be reported late; only what is trained on tells where training is
        last = self._last_step.get(type(record), -1)
        self._last_step[type(record)] = record.step
        if record.step >= last:
            return []
        if isinstance(record, LoadRecord):
            self._accumulated = AccumulatedLoad(self._global_window)
        if isinstance(record, ProbeRecord):
            self._probed.restart()
        return detector.rewind(record.step, last)

    def _announce(self, alert: AlertRecord) -> None:
        """Tell the listener what a person wants to hear once: raised, graver, cleared; not every worse peak."""
        known = self._announced.get(alert.episode)
        self._announced[alert.episode] = alert.severity
        if alert.cleared_step is not None:
            del self._announced[alert.episode]
        elif known == alert.severity:
            return
        if self._on_alert is not None:
            try:
                self._on_alert(alert)
            except Exception:
                _log.exception("the listener for alerts failed on %s", alert.episode)


class _Detector(Protocol):
    def rewind(self, step: int, last_step: int) -> list[AlertRecord]: ...
