"""Between a run's records and a tracker: a bounded queue and a thread of the tracker's own.

Trackers import slowly, wait for networks and fail. So each is opened, called and closed in its own daemon thread; what
fails is logged once and counted, and when it cannot keep up the oldest waiting digests are given up and counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from moeviz.bridges.digest import Digest, digest_of
from moeviz.bridges.tracker import Tracker
from moeviz.records import AlertRecord, EventRecord, ModelInfo, Record, Sink

_log = logging.getLogger("moeviz.bridges")

_CLOSE_SECONDS = 20.0
"""How long the end of a run waits for its trackers: less than the writer's thread has to end in."""


class BridgeStats(NamedTuple):
    sent: int
    failed: int
    """Digests and alerts that the tracker refused, or that came after it could not be opened."""
    dropped: int
    """Those given up because too many waited, or because there was no time left at the end."""


class Bridge:
    """Hands digests to one tracker; `offer` never blocks and never raises."""

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], capacity: int = 4096) -> None:
        """Start the thread.

        Args:
            name: of the tracker, for messages.
            open_tracker: called in the thread.
            capacity: digests that wait at most.
        """
        self.name = name
        self.place = ""
        """Where the tracker keeps what it is told, once it is open."""
        self._open_tracker = open_tracker
        self._queue: deque[Digest | AlertRecord] = deque()
        self._capacity = capacity
        self._wake = threading.Condition()
        self._closing = self._closed = False
        self._said = False
        self._sent = self._failed = self._dropped = 0
        self._thread = threading.Thread(target=self._run, name=f"moeviz-{name}", daemon=True)
        self._thread.start()

    def offer(self, item: Digest | AlertRecord) -> None:
        """Queue what the tracker shall be told."""
        with self._wake:
            if self._closing or len(self._queue) >= self._capacity:
                self._dropped += 1
            if self._closing:
                return
            if len(self._queue) >= self._capacity:
                self._queue.popleft()
            self._queue.append(item)
            self._wake.notify()

    def finish(self) -> None:
        """Take no more, deliver what waits, and close the tracker; does not wait for it."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def close(self, timeout: float = _CLOSE_SECONDS) -> BridgeStats:
        """`finish`, and wait for it for at most `timeout` seconds. Closing twice is allowed."""
        self.finish()
        self._thread.join(timeout)
        with self._wake:
            self._dropped += len(self._queue)
            self._queue.clear()
        if not self._closed and (self._failed or self._dropped):
            _log.warning(
                "%s: %d told, %d failed, %d given up; the run folder has all of it",
                self.name,
                *(self._sent, self._failed, self._dropped),
            )
        self._closed = True
        return self.stats

    @property
    def stats(self) -> BridgeStats:
        return BridgeStats(self._sent, self._failed, self._dropped)

    # The thread.

    def _run(self) -> None:
        tracker: Tracker | None = None
        try:
            tracker = self._open_tracker()
            self.place = tracker.place
        except BaseException as error:  # some trackers raise SystemExit
            self._say("could not be opened", error)
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    break
                item = self._queue.popleft()
            self._deliver(tracker, item)
        if tracker is not None:
            try:
                tracker.close()
            except Exception as error:
                self._say("could not be closed", error)

    def _deliver(self, tracker: Tracker | None, item: Digest | AlertRecord) -> None:
        if tracker is None:
            self._failed += 1
            return
        try:
            tracker.alert(item) if isinstance(item, AlertRecord) else tracker.log(item)
            self._sent += 1
        except Exception as error:
            self._failed += 1
            self._say(f"refused step {getattr(item, 'step', getattr(item, 'updated_step', -1))}", error)

    def _say(self, what: str, error: BaseException) -> None:
        if not self._said:
            self._said = True
            _log.warning(
                "%s %s: %s: %s; training and recording go on, further failures are only counted",
                *(self.name, what, type(error).__name__, error),
            )


class Bridged:
    """A sink that tells trackers about what passes through it."""

    def __init__(self, inner: Sink, bridges: Sequence[Bridge], model: ModelInfo, every: int = 10) -> None:
        """Wrap `inner`.

        Args:
            inner: where all records go, first.
            bridges: closed with the sink.
            model: the watched model.
            every: steps between two that metrics and loads are told of.
        """
        self._inner, self._bridges, self._model, self._every = inner, bridges, model, every
        self._announced: dict[str, str] = {}
        self._step = 0
        self.flush = inner.flush

    def write(self, record: Record) -> None:
        """Pass a record on, then tell the trackers. Raises only what `inner` raises."""
        self._inner.write(record)
        self._step = getattr(record, "step", self._step)
        try:
            item = self._told(record)
        except Exception:
            _log.debug("nothing is told of a %s", type(record).__name__, exc_info=True)
            return
        if item is not None:
            for bridge in self._bridges:
                bridge.offer(item)

    def close(self) -> None:
        """Close the trackers, note how it went, close `inner`. An `inner` that refuses may be closed again."""
        bridges, self._bridges = self._bridges, ()
        if bridges:
            self._inner.flush()  # what is recorded does not wait for trackers
        for bridge in bridges:
            bridge.finish()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for bridge in bridges:
            stats = bridge.close(max(deadline - time.monotonic(), 0.0))
            detail = {"name": bridge.name, "place": bridge.place, **stats._asdict()}
            self._inner.write(
                EventRecord(step=self._step, rank=0, ts=time.time(), kind="tracker_closed", detail=detail)
            )
        self._inner.close()

    def _told(self, record: Record) -> Digest | AlertRecord | None:
        if isinstance(record, AlertRecord):
            return record if self._is_news(record) else None
        return digest_of(record, self._model, self._every)

    def _is_news(self, alert: AlertRecord) -> bool:
        """Whether it was raised, became graver or was cleared: not every worse peak."""
        state = "cleared" if alert.cleared_step is not None else alert.severity
        known = self._announced.get(alert.episode)
        self._announced[alert.episode] = state
        if state == "cleared":
            del self._announced[alert.episode]
        return state != known
