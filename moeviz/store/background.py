"""Between training and a sink: a bounded queue and one daemon thread, so that recording never stops a step.

`write` appends and returns. It never blocks and never raises. When the queue is full, samples (token-level
rows and maps) are dropped and counted; loads, scalars, metrics, alerts and events never are. An exception of
the sink is logged once with a remedy, counted, and recording goes on.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from moeviz.records import (
    AttentionRecord,
    EventRecord,
    Record,
    SequenceRecord,
    Sink,
    TokenRoutingRecord,
)

_log = logging.getLogger("moeviz.store")
_SAMPLES = (TokenRoutingRecord, SequenceRecord, AttentionRecord)
FLUSH_SECONDS = 0.75
"""How often what was written becomes visible: a reader that looks every 0.2 s then sees 19 of 20 steps within a
second of their end. Each flush costs about 5 ms of processor time, whatever is in it."""
UNREAD_FLUSH_SECONDS = 10.0
"""How often while nobody reads: what a killed process owes at most. The demo's flush takes 5 ms, and 0.4 for each step
in it."""
_RETRY_SECONDS = 0.25
_LOOK_SECONDS = 0.5
"""How often a flush looks whether anybody is there to do it."""
_POLL_SECONDS = 0.05
"""How often the thread looks for work. Waking it at every write would hand it the interpreter in the middle of a
step: measured on two busy cores, a `write` that took 0.03 ms then took 5 to 10."""
_UNREAD_POLL_SECONDS = 0.5
"""How often while nobody reads."""
_GATHER_BYTES = 16e6
"""Queued bytes that are worked on at once. Less than that waits for the next flush: a dozen steps one after another
find the processor's caches warm, and cost half of what they cost one by one between training steps."""
_ARRAYS = ("experts_LNSK", "weights_LNSK", "token_ids_NS", "token_loss_NS", "map_QC")


@runtime_checkable
class Deferred(Protocol):
    """Work to finish off the training thread: device copies in flight, reductions on the host.

    Optional: `prepare(items)`, a static method that does for all queued items of a class what is cheaper together,
    before each of them is finished on its own; and the attributes `droppable: bool` (True: only samples inside, a
    full queue may drop it whole; default False), `nbytes: int` (memory it holds, counted against the queue's bound),
    `step: int` and `rank: int` (for the event that reports a drop).
    """

    def materialize(self) -> Iterable[Record]: ...


class QueueStats(NamedTuple):
    """What passed through a `BackgroundSink` so far."""

    written: int
    """Records handed to the inner sink."""
    dropped_samples: int
    """Samples given up because the queue was full."""
    errors: int
    """Exceptions of the inner sink or of deferred work."""
    lost: int
    """Records that the inner sink refused for good, and items still queued when close ran out of time."""
    max_write_seconds: float
    """Longest time one `write` kept the training thread."""


class BackgroundSink:
    """A `Sink` in front of another one; see the module docstring. Arrays of a record must not be reused."""

    def __init__(
        self,
        inner: Sink,
        capacity: int = 4096,
        capacity_bytes: float = 256e6,
        flush_seconds: float = FLUSH_SECONDS,
        is_read: Callable[[], bool] | None = None,
        unread_flush_seconds: float | None = None,
    ) -> None:
        """Start the thread.

        Args:
            inner: called from the thread only.
            capacity: queued items above which samples are dropped.
            capacity_bytes: queued bytes of arrays above which samples are dropped.
            flush_seconds: how often what was written is made visible.
            is_read: whether somebody looks at it; asked from the thread, several times a second. None: always.
            unread_flush_seconds: how often while nobody does; None: UNREAD_FLUSH_SECONDS.
        """
        self._inner = inner
        self._capacity, self._capacity_bytes = capacity, capacity_bytes
        self._flush_seconds = flush_seconds
        self._unread_flush_seconds = (
            UNREAD_FLUSH_SECONDS if unread_flush_seconds is None else unread_flush_seconds
        )
        self._is_read = is_read or (lambda: True)
        self._queue: deque[tuple[Record | Deferred | threading.Event, int]] = deque()
        """Appended to without the lock as well; taken from in the thread alone."""
        self._queued_bytes = 0
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._asked = 0
        self._closing = False
        self._closed = False
        self._deadline = float("inf")
        self._written = self._dropped = self._reported = self._errors = self._lost = 0
        self._max_write_seconds = 0.0
        self._at = (0, 0)
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="moeviz-writer", daemon=True)
        self._thread.start()
        atexit.register(_close_at_exit, weakref.ref(self), os.getpid())

    def write(self, record: Record | Deferred) -> None:
        """Queue a record or a deferred item. Returns at once; never raises."""
        droppable = getattr(record, "droppable", None)
        if droppable is False and not self._closing:
            self._queue.append((record, 0))  # what every step has: nothing to weigh, no lock
            return
        begin = time.perf_counter()
        if droppable is None:
            droppable = isinstance(record, _SAMPLES)
        size = _array_bytes(record) if droppable else 0
        with self._lock:
            full = len(self._queue) >= self._capacity or self._queued_bytes + size > self._capacity_bytes
            if self._closing:
                self._lost += 1
            elif droppable and full:
                self._dropped += 1
                self._at = (getattr(record, "step", self._at[0]), getattr(record, "rank", self._at[1]))
            else:
                self._queue.append((record, size))
                self._queued_bytes += size
                if self._queued_bytes > self._capacity_bytes / 2 or len(self._queue) == self._capacity // 2:
                    self._wake.notify()
        self._max_write_seconds = max(self._max_write_seconds, time.perf_counter() - begin)

    def flush(self, timeout: float = 30.0) -> bool:
        """Wait until everything queued so far is visible to readers. False when that took longer."""
        done = threading.Event()
        with self._wake:
            if self._closing:
                return self._closed
            self._queue.append((done, 0))
            self._asked += 1
            self._wake.notify()
        deadline = time.monotonic() + timeout
        while not done.wait(min(_LOOK_SECONDS, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline or not self._thread.is_alive():
                return False
        return True

    def close(self, timeout: float = 30.0) -> QueueStats:
        """Write what is queued, close the inner sink, stop the thread. Closing twice is allowed.

        While the disk refuses, closing tries again until `timeout` seconds are over; then it says what is lost.
        """
        with self._wake:
            self._deadline = min(self._deadline, time.monotonic() + timeout)
            self._closing = True
            self._wake.notify()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout + 1.0)
        with self._wake:
            if not self._closed and (self._thread.is_alive() or self._queue):
                waiting = len(self._queue)
                self._lost += waiting
                lost = f"{waiting} items are lost" if waiting else "the last seconds may not be on the disk"
                self._say("close", f"writing did not finish within {timeout:g} s; {lost}")
            self._closed = True
        return self.stats

    @property
    def stats(self) -> QueueStats:
        return QueueStats(self._written, self._dropped, self._errors, self._lost, self._max_write_seconds)

    # The thread.

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._say(
                "dead", f"the recorder's thread ended ({type(error).__name__}): nothing more is recorded"
            )
            raise
        finally:
            with self._lock:
                self._closing = True  # what nobody takes out must not pile up

    def _work(self) -> None:
        flushed, dirty = time.monotonic(), False
        while True:
            gathered, finished = self._gather(flushed, dirty)
            self._prepare(gathered)
            for _ in range(gathered):
                with self._lock:
                    item, size = self._queue.popleft()
                    self._queued_bytes -= size
                if isinstance(item, threading.Event):
                    dirty, flushed = not self._flush_inner(), time.monotonic()
                    with self._lock:
                        self._asked -= 1
                    item.set()
                else:
                    self._deliver(item)
                    dirty = True
            if finished:
                self._finish()
                return
            if dirty and time.monotonic() >= flushed + self._interval()[0]:
                dirty, flushed = not self._flush_inner(), time.monotonic()

    def _interval(self) -> tuple[float, float]:
        """Seconds between flushes, and between looks for work."""
        if self._is_read():
            return self._flush_seconds, _POLL_SECONDS
        return max(self._flush_seconds, self._unread_flush_seconds), _UNREAD_POLL_SECONDS

    def _gather(self, flushed: float, dirty: bool) -> tuple[int, bool]:
        """Wait until there is work; (how many items to take now, whether they are the last ones)."""
        while True:
            seconds, pause = (
                self._interval()
            )  # may ask a slow file system: not under the lock that `write` takes
            with self._wake:
                if (
                    self._closing
                    or self._asked
                    or self._queued_bytes > min(_GATHER_BYTES, self._capacity_bytes / 2)
                    or self._held_bytes() > _GATHER_BYTES
                    or len(self._queue) >= self._capacity // 2 > 0
                    or ((self._queue or dirty) and time.monotonic() >= flushed + seconds)
                ):
                    return len(self._queue), self._closing
                self._wake.wait(pause)

    def _held_bytes(self) -> float:
        """Memory of queued items that are not dropped."""
        return sum(getattr(item, "nbytes", 0) for item, size in self._queue.copy() if size == 0)

    def _prepare(self, gathered: int) -> None:
        """Let items of a kind do together what is cheaper that way; their own turn tells what failed."""
        kinds: dict[Callable[[list[object]], None], list[object]] = {}
        for item, _ in islice(self._queue.copy(), gathered):  # a copy: `write` may append meanwhile
            prepare = getattr(item, "prepare", None)
            if prepare is not None:
                kinds.setdefault(prepare, []).append(item)
        for prepare, items in kinds.items():
            if len(items) > 1:
                try:
                    prepare(items)
                except Exception:
                    _log.debug("items could not be prepared together", exc_info=True)

    def _flush_inner(self) -> bool:
        self._report_drops()
        return self._attempt("flush", self._inner.flush)

    def _finish(self) -> None:
        """Close the inner sink, again and again while the disk refuses and there is time."""
        self._report_drops()
        while not self._attempt("close", self._inner.close):
            if time.monotonic() + _RETRY_SECONDS > self._deadline:
                self._say("lost", "closing the recorder failed: what was not on the disk yet is lost")
                return
            time.sleep(_RETRY_SECONDS)

    def _deliver(self, item: Record | Deferred) -> None:
        try:
            # Asking for the protocol takes ten times as long.
            materialize = getattr(item, "materialize", None)
            records: Iterable[Record] = (item,) if materialize is None else materialize()  # type: ignore[assignment]
            for record in records:
                self._write_inner(record)
        except Exception as error:
            self._fail("deferred work", error)
            self._lost += 1

    def _write_inner(self, record: Record) -> None:
        try:
            self._inner.write(record)
            self._written += 1
        except OSError as error:  # a sink keeps what the disk refused and tries again
            self._written += 1
            self._fail("write", error)
        except Exception as error:
            self._lost += 1
            self._fail("write", error)

    def _attempt(self, what: str, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:
            self._fail(what, error)
            return False
        return True

    def _fail(self, what: str, error: Exception) -> None:
        self._errors += 1
        message = (
            f"recording failed in {what}: {type(error).__name__}: {error}; {_remedy(error)}; training goes on"
        )
        if self._say(f"{what}/{type(error).__name__}/{getattr(error, 'errno', '')}", message):
            _log.debug("recording failed", exc_info=error)
            detail = {"where": what, "error": f"{type(error).__name__}: {error}"}
            self._try_event("recording_failed", detail)

    def _report_drops(self) -> None:
        dropped = self._dropped
        if dropped > self._reported:
            samples = dropped - self._reported
            self._say(
                "drop",
                f"the recorder is behind: {samples} samples dropped (loads are complete); sample less often",
            )
            if self._try_event("dropped_samples", {"samples": samples, "total": dropped}):
                self._reported = dropped

    def _try_event(self, kind: str, detail: Mapping[str, object]) -> bool:
        step, rank = self._at
        try:
            self._inner.write(EventRecord(step=step, rank=rank, ts=time.time(), kind=kind, detail=detail))
        except OSError:
            return True  # kept for the next flush
        except Exception:
            _log.debug("an event could not be recorded", exc_info=True)
            return False
        return True

    def _say(self, key: str, message: str) -> bool:
        """Warn once per key."""
        if key in self._said:
            return False
        self._said.add(key)
        _log.warning("%s", message)
        return True


def _array_bytes(record: object) -> int:
    size = getattr(record, "nbytes", None)
    if isinstance(size, int):
        return size
    if not isinstance(record, _SAMPLES):
        return 0
    arrays = (getattr(record, name, None) for name in _ARRAYS)
    return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))


def _remedy(error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full: free space and recording catches up"
    if isinstance(error, PermissionError) or number == errno.EROFS:
        return "make the run folder writable and recording catches up"
    if isinstance(error, OSError):
        return "check the file system of the run folder; recording tries again at every flush"
    return "what this record said is lost; details with logging level DEBUG"


def _close_at_exit(reference: weakref.ref[BackgroundSink], pid: int) -> None:
    """A script that ends without close() keeps its last second. A forked child has no thread to join."""
    sink = reference()
    if sink is not None and os.getpid() == pid and not sink._closed:
        sink.close(timeout=10.0)
