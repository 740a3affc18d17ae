"""A thread that turns a run folder into snapshots: what the terminal UI and the live page look at.

One poll reads only what is newer than the last one. A poll that fails is logged once, and the next one tries
again: a screen must outlive a run folder that is being moved.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from moeviz.live import RunState, Series, Snapshot
from moeviz.records import AlertRecord
from moeviz.store.load_ring import LoadRing
from moeviz.store.queries_loads import clock_table, last_step, load_history
from moeviz.store.queries_runs import has_ended, run_state, step_rhythm
from moeviz.store.queries_series import alert_records, dropped_samples, scalars
from moeviz.store.reader import Store, open_run

_log = logging.getLogger("moeviz.store")
_TABLES = ("expert_load", "scalars", "alerts", "events")


class RunFeed:
    """Implements `moeviz.live.Feed` over a run folder, live, ended or packed."""

    def __init__(
        self,
        path: str | Path,
        poll_seconds: float = 0.25,
        history: int = 240,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the run.

        Args:
            path: as for `open_run`.
            poll_seconds: pause between two looks at the folder.
            history: steps of loads, and points of each scalar, that a snapshot holds at most.
            clock: seconds since the epoch.

        Raises:
            RunNotFoundError, CorruptRunError: as `open_run`.
        """
        self._store: Store = open_run(path)
        self._poll_seconds, self._history, self._clock = poll_seconds, history, clock
        self._latest: Snapshot | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._said: set[str] = set()
        self._ended, self._dropped, self._step = False, 0, -1
        self._newest_ts: float | None = None
        self._interval = 0.0
        self._alerts: tuple[AlertRecord, ...] = ()
        self._scalars: dict[str, Series] = {}
        self._revisions: dict[str, int] = {}
        self._forget()

    @property
    def latest(self) -> Snapshot | None:
        """The newest snapshot; None before the first poll."""
        return self._latest

    def start(self) -> None:
        """Poll in a daemon thread until `stop`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="moeviz-feed", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread and close the run. The latest snapshot stays."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10.0)
        self._store.close()

    def poll(self) -> Snapshot:
        """Look at the run once, publish what is there, and return it. The thread calls it, and `--once`."""
        revisions = self._store.revisions()
        if self._store.info.attempt != self._attempt:
            self._forget()
        previous = self._latest
        changed = {table for table in _TABLES if revisions[table] != self._revisions.get(table)}
        if previous is None or changed:
            self._read(changed)
            snapshot = self._snapshot(0 if previous is None else previous.revision + 1)
            self._revisions = revisions
        else:
            snapshot = replace(previous, behind_seconds=self._behind(), state=self._state())
            whole_second = int(snapshot.behind_seconds) != int(previous.behind_seconds)
            if snapshot.state != previous.state or (whole_second and snapshot.state != "ended"):
                snapshot = replace(snapshot, revision=previous.revision + 1)
        self._latest = snapshot
        return snapshot

    def _loop(self) -> None:
        while not self._stop.is_set():
            try:
                self.poll()
            except Exception as error:
                if str(error) not in self._said and not self._stop.is_set():
                    self._said.add(str(error))
                    _log.warning("looking at %s failed: %s; trying again", self._store.path, error)
            self._stop.wait(self._poll_seconds)

    def _forget(self) -> None:
        """Start afresh: at first, and when a resumed run goes on from an earlier step."""
        self._attempt = self._store.info.attempt
        self._ring = LoadRing(self._store.info.model, self._history)
        self._revisions, self._scalars, self._step = {}, {}, -1

    def _read(self, changed: set[str]) -> None:
        """Ask only the tables that changed, and those that grow with every step only for what is new."""
        if clock_table(self._store) in changed:
            self._read_steps()
        if "scalars" in changed:
            self._scalars = self._newer_scalars()
        if "alerts" in changed:
            self._alerts = alert_records(self._store)
        if "events" in changed:
            self._dropped = dropped_samples(self._store)
            self._ended = has_ended(self._store)

    def _read_steps(self) -> None:
        newest = last_step(self._store)
        if newest is None or newest == self._step:
            return
        if self._store.info.model.layers:
            first = max(self._ring.step + 1, newest - self._history + 1)
            self._ring.extend(load_history(self._store, first, newest))
            self._newest_ts, self._interval = float(self._ring.times_T[-1]), self._ring.interval
        else:
            self._newest_ts, self._interval = step_rhythm(self._store)
        self._step = newest

    def _newer_scalars(self) -> dict[str, Series]:
        """Every scalar over the whole run: `history` bucket means, then newer points up to twice that."""
        known = self._scalars
        newest = max((int(series.steps[-1]) for series in known.values()), default=None)
        if newest is None or max(len(series.steps) for series in known.values()) > 2 * self._history:
            rows = scalars(self._store, points=self._history)
            return {
                str(name): Series(steps=one["step"].to_numpy(), values=one["value"].to_numpy())
                for name, one in rows.groupby("name", sort=True)
            }
        rows = self._store.frame(
            lambda: (
                f"""SELECT name, step, avg(value) AS value FROM {self._store.source("scalars", newest)}
            WHERE step >= ? GROUP BY name, step ORDER BY name, step"""
            ),
            [newest],
        )
        grown = dict(known)
        for name, one in rows.groupby("name"):
            old = grown.get(str(name), Series(steps=np.zeros(0, dtype=np.int64), values=np.zeros(0)))
            one = one[one["step"] > (old.steps[-1] if len(old.steps) else -1)]
            grown[str(name)] = Series(
                steps=np.concatenate((old.steps, one["step"])),
                values=np.concatenate((old.values, one["value"])),
            )
        return grown

    def _behind(self) -> float:
        return 0.0 if self._newest_ts is None else max(0.0, self._clock() - self._newest_ts)

    def _state(self) -> RunState:
        return run_state(self._newest_ts, self._interval, self._ended, self._clock())

    def _snapshot(self, revision: int) -> Snapshot:
        info, ring = self._store.info, self._ring
        return Snapshot(
            run_name=info.name,
            run_path=str(self._store.path),
            info=info.model,
            state=self._state(),
            revision=revision,
            behind_seconds=self._behind(),
            step=self._step,
            planned_steps=info.planned_steps,
            tokens=ring.tokens,
            load_rel_LE=ring.load_rel_LE,
            load_rel_ema_LE=ring.load_rel_ema_LE,
            history_steps_T=ring.steps_T,
            load_entropy_TL=ring.load_entropy_TL,
            route_entropy_TL=ring.route_entropy_TL,
            max_load_TL=ring.max_load_TL,
            n_eff_L=ring.n_eff_L,
            drop_rate_L=ring.drop_rate_L,
            scalars=self._scalars,
            alerts=self._alerts,
            dropped_samples=self._dropped,
            notes=tuple(self._store.notes),
        )
