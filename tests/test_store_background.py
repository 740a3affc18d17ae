"""The queue between training and a sink: never blocks, never raises, drops samples only, and says so."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from store_runs import Step, new_run

from moeviz.records import EventRecord, LoadRecord, Record, ScalarRecord, TokenRoutingRecord
from moeviz.store.background import BackgroundSink, _array_bytes
from moeviz.store.queries import dropped_samples
from moeviz.store.reader import open_run
from moeviz.store.writer import SegmentWriter

TESTS = Path(__file__).parent


class Memory:
    """A sink that remembers, can be held up, and can fail."""

    def __init__(self, error: Exception | None = None, on: str = "write") -> None:
        self.records: list[Record] = []
        self.calls: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error, self.on = error, on

    def _call(self, name: str) -> None:
        self.gate.wait(10)
        self.calls.append(name)
        if self.error is not None and name == self.on:
            raise self.error

    def write(self, record: Record) -> None:
        self._call("write")
        self.records.append(record)

    def flush(self) -> None:
        self._call("flush")

    def close(self) -> None:
        self._call("close")

    def of(self, kind: type) -> list[Record]:
        return [record for record in self.records if isinstance(record, kind)]


def scalar(step: int) -> ScalarRecord:
    return ScalarRecord(step=step, rank=0, ts=0.0, values={"loss": 1.0})


def test_records_arrive_in_order_and_close_closes() -> None:
    inner = Memory()
    sink = BackgroundSink(inner)
    for step in range(500):
        sink.write(scalar(step))
    stats = sink.close()
    assert [record.step for record in inner.records] == list(range(500))
    assert inner.calls[-1] == "close"
    assert (stats.written, stats.dropped_samples, stats.errors, stats.lost) == (500, 0, 0, 0)
    assert sink.close() == stats


def test_small_records_wait_for_the_flush_and_are_worked_on_together() -> None:
    inner = Memory()
    sink = BackgroundSink(inner, flush_seconds=1e9)
    for step in range(3):
        sink.write(scalar(step))
    assert inner.calls == []
    assert sink.flush(60.0)
    assert inner.calls == ["write"] * 3 + ["flush"]
    for step in range(3):
        sink.write(scalar(step))
    sink.close()
    assert inner.calls == ["write"] * 3 + ["flush"] + ["write"] * 3 + ["close"]


def test_what_was_written_is_seen_without_being_asked_for() -> None:
    inner = Memory()
    sink = BackgroundSink(inner, flush_seconds=0.01)
    for step in range(3):
        sink.write(scalar(step))
        patience = time.monotonic() + 60
        while inner.calls.count("flush") <= step and time.monotonic() < patience:
            time.sleep(0.001)
        assert inner.calls == ["write", "flush"] * (step + 1)
    sink.close()


@pytest.mark.parametrize("many", [{"capacity": 8}, {"capacity_bytes": 3_000}])
def test_a_queue_that_fills_up_is_worked_on_before_the_flush(many: dict[str, float]) -> None:
    inner = Memory()
    sink = BackgroundSink(inner, flush_seconds=1e9, **many)  # type: ignore[arg-type]
    samples = [record for step in range(2) for record in Step(step).records()]
    sizes = [_array_bytes(record) for record in samples]
    assert sum(sizes) > 1_500, "more than half of the bytes"
    for record in samples:
        sink.write(record)
    patience = time.monotonic() + 60
    while not inner.records and time.monotonic() < patience:
        time.sleep(0.001)
    assert inner.records
    assert "flush" not in inner.calls
    sink.close()


def test_a_full_queue_drops_samples_counts_them_and_keeps_everything_else() -> None:
    inner = Memory()
    inner.gate.clear()
    sink = BackgroundSink(inner, capacity=10, flush_seconds=0.01)
    steps = [Step(number) for number in range(20)]
    for step in steps:
        for record in step.records():
            sink.write(record)
    dropped = sink.stats.dropped_samples
    inner.gate.set()
    stats = sink.close()
    kept = len(inner.of(TokenRoutingRecord))
    assert len(inner.of(LoadRecord)) == len(inner.of(ScalarRecord)) == 20
    assert stats.dropped_samples == dropped > 40
    assert kept < 20
    events = [event for event in inner.of(EventRecord) if event.kind == "dropped_samples"]
    assert sum(event.detail["samples"] for event in events) == dropped
    assert events[-1].detail["total"] == dropped


def test_the_bound_is_in_bytes_too() -> None:
    inner = Memory()
    inner.gate.clear()
    sink = BackgroundSink(inner, capacity_bytes=10_000)
    big = TokenRoutingRecord(
        step=0,
        rank=0,
        layers=np.arange(1),
        seqs=np.arange(1),
        experts_LNSK=np.zeros((1, 1, 500, 1), np.uint16),
        weights_LNSK=np.zeros((1, 1, 500, 1), np.float32),
        lengths_N=np.array([500]),
    )
    for _ in range(9):
        sink.write(big)
    inner.gate.set()
    assert sink.close().dropped_samples in (5, 6)  # 3,000 bytes each: three wait, one may be in delivery


def test_dropped_samples_are_in_the_run(tmp_path: Path) -> None:
    path = new_run(tmp_path / "run")
    sink = BackgroundSink(SegmentWriter(path), capacity=0)
    for record in Step(4).records():
        sink.write(record)
    assert sink.close().dropped_samples == 3
    with open_run(path) as store:
        assert dropped_samples(store) == 3
        assert store.sql("SELECT count(*) AS n FROM expert_load")["n"].iloc[0] == 3
        assert store.sql("SELECT step FROM events WHERE kind = 'dropped_samples'")["step"].tolist() == [4]


@pytest.mark.parametrize("on", ["write", "flush", "close"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), ValueError("bad"), PermissionError(13, "no")]
)
def test_a_failing_sink_never_raises_and_is_named_once(
    on: str, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="moeviz.store")
    sink = BackgroundSink(Memory(error, on), flush_seconds=0.001)
    for step in range(50):
        sink.write(scalar(step))
        time.sleep(0.0005)
    sink.flush(timeout=60.0)
    stats = sink.close(timeout=3.0)
    assert stats.errors >= 1
    said = [record.getMessage() for record in caplog.records if f"in {on}" in record.getMessage()]
    assert len(said) == 1
    assert "training goes on" in said[0]
    remedies = {OSError: "free space", ValueError: "lost", PermissionError: "make the run folder writable"}
    assert remedies[type(error)] in said[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_without_its_thread_nothing_piles_up_and_nobody_waits(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="moeviz.store")
    sink = BackgroundSink(Memory(SystemExit()))  # type: ignore[arg-type]  # no Exception: it ends the thread
    sink.write(scalar(0))
    assert not sink.flush(timeout=600.0), "comes back at once"
    for step in range(1, 5):
        sink.write(scalar(step))
    assert len(sink._queue) <= 1, "of the flush"
    stats = sink.close(timeout=600.0)
    assert stats.lost >= 4
    assert "nothing more is recorded" in caplog.text


def test_recording_goes_on_after_an_error() -> None:
    inner = Memory(ValueError("bad"))
    sink = BackgroundSink(inner)
    sink.write(scalar(0))
    assert sink.flush()
    inner.error = None
    sink.write(scalar(1))
    stats = sink.close()
    assert [record.step for record in inner.of(ScalarRecord)] == [1]
    assert (stats.written, stats.lost, stats.errors) == (1, 1, 1)


def test_flush_waits_for_what_was_written_before_it() -> None:
    inner = Memory()
    sink = BackgroundSink(inner, flush_seconds=1e9)
    for step in range(100):
        sink.write(scalar(step))
    assert sink.flush()
    assert len(inner.records) == 100
    assert inner.calls[-1] == "flush"
    inner.gate.clear()
    sink.write(scalar(100))
    assert not sink.flush(timeout=0.05)
    inner.gate.set()
    sink.close()


def test_flush_is_answered_while_records_keep_coming() -> None:
    inner, stop = Memory(), threading.Event()
    sink = BackgroundSink(inner, flush_seconds=1e9)

    def train() -> None:
        step = 0
        while not stop.is_set():
            sink.write(scalar(step))
            step += 1
            if step % 50 == 0:
                time.sleep(0.001)

    trainer = threading.Thread(target=train)
    trainer.start()
    time.sleep(0.05)
    flushed = sink.flush(timeout=120.0)
    stop.set()
    trainer.join()
    sink.close()
    assert flushed
    assert "flush" in inner.calls


def test_closing_waits_for_room_on_the_disk(tmp_path: Path) -> None:
    inner = Memory(OSError(errno.ENOSPC, "No space left"), on="close")
    sink = BackgroundSink(inner)
    sink.write(scalar(0))
    room = threading.Timer(2.0, lambda: setattr(inner, "error", None))
    room.start()
    stats = sink.close(timeout=120.0)
    assert inner.calls.count("close") >= 2
    assert (stats.lost, stats.written) == (0, 1)


def test_an_idle_sink_makes_the_last_step_visible_by_itself() -> None:
    inner = Memory()
    sink = BackgroundSink(inner, flush_seconds=0.02)
    sink.write(scalar(0))
    deadline = time.monotonic() + 60
    while "flush" not in inner.calls and time.monotonic() < deadline:
        time.sleep(0.005)
    assert inner.calls == ["write", "flush"]
    time.sleep(0.1)
    assert inner.calls == ["write", "flush"], "nothing new, nothing to flush"
    sink.close()


class Later:
    """Deferred work that notes the thread it ran in."""

    def __init__(self, records: list[Record], droppable: bool = False) -> None:
        self.inner, self.droppable, self.step, self.rank = records, droppable, 7, 0
        self.thread = ""

    def materialize(self) -> Iterator[Record]:
        self.thread = threading.current_thread().name
        yield from self.inner


def test_deferred_work_is_done_in_the_thread() -> None:
    inner, later = Memory(), Later([scalar(0), scalar(1)])
    sink = BackgroundSink(inner)
    sink.write(later)
    sink.write(scalar(2))
    sink.close()
    assert [record.step for record in inner.records] == [0, 1, 2]
    assert later.thread == "moeviz-writer"


def test_only_droppable_deferred_work_is_dropped() -> None:
    inner = Memory()
    sink = BackgroundSink(inner, capacity=0)
    sink.write(Later([scalar(0)]))
    sink.write(Later([scalar(1)], droppable=True))
    assert sink.close().dropped_samples == 1
    assert [record.step for record in inner.of(ScalarRecord)] == [0]


def test_failing_deferred_work_is_counted_and_the_next_is_done() -> None:
    class Broken:
        def materialize(self) -> Iterator[Record]:
            yield scalar(0)
            raise RuntimeError("device gone")

    inner = Memory()
    sink = BackgroundSink(inner)
    sink.write(Broken())
    sink.write(scalar(1))
    stats = sink.close()
    assert [record.step for record in inner.of(ScalarRecord)] == [0, 1]
    assert (stats.errors, stats.lost) == (1, 1)
    assert [event.kind for event in inner.of(EventRecord)] == ["recording_failed"]


def test_close_gives_up_after_its_timeout_and_says_what_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    inner = Memory()
    inner.gate.clear()
    sink = BackgroundSink(inner)
    for step in range(5):
        sink.write(scalar(step))
    stats = sink.close(timeout=0.1)  # the gate stays shut: a close that waited would not end
    assert stats.lost >= 4
    assert "did not finish" in caplog.text
    sink.write(scalar(9))
    assert sink.stats.lost == stats.lost + 1
    inner.gate.set()


def test_a_slow_sink_does_not_hold_up_the_training_thread() -> None:
    inner = Memory()
    inner.gate.clear()
    sink = BackgroundSink(inner)
    record = next(one for one in Step(0).records() if isinstance(one, LoadRecord))
    for _ in range(200):
        sink.write(record)
    assert not inner.gate.is_set(), "whoever waited for the sink would not have come this far"
    inner.gate.set()
    sink.close()


def test_a_script_that_forgets_to_close_keeps_its_last_step(tmp_path: Path) -> None:
    path = new_run(tmp_path / "run")
    program = f"""
        import sys
        sys.path.insert(0, {str(TESTS)!r})
        from store_runs import Step
        from moeviz.store.writer import BackgroundSink, SegmentWriter
        sink = BackgroundSink(SegmentWriter({str(path)!r}))
        for record in Step(8).records():
            sink.write(record)
        raise RuntimeError("training died")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert "training died" in done.stderr
    with open_run(path) as store:
        assert store.sql("SELECT DISTINCT step FROM expert_load")["step"].tolist() == [8]


class Kept:
    """A step on its way: work for the thread, prepared together, never dropped."""

    droppable = False
    prepared = 0

    def __init__(self, step: int) -> None:
        self.step = step

    @staticmethod
    def prepare(items: list[Kept]) -> None:
        Kept.prepared += len(items)

    def materialize(self) -> Iterator[Record]:
        yield scalar(self.step)


def test_steps_are_queued_while_the_thread_looks_at_the_queue() -> None:
    inner, steps, before = Memory(), 0, sys.getswitchinterval()
    sink, done = BackgroundSink(inner, flush_seconds=1e9), threading.Event()

    def look() -> None:
        while not done.is_set():
            sink.flush()

    looking = threading.Thread(target=look)
    sys.setswitchinterval(1e-6)
    patience = time.monotonic() + 60
    try:
        looking.start()
        while inner.calls.count("flush") < 60 and time.monotonic() < patience and sink._thread.is_alive():
            for _ in range(300):
                sink.write(Kept(steps))
                steps += 1
            time.sleep(1e-4)
    finally:
        sys.setswitchinterval(before)
        done.set()
        looking.join(60)
    stats = sink.close(timeout=120.0)
    assert [record.step for record in inner.records] == list(range(steps))
    assert (stats.written, stats.errors, stats.lost) == (steps, 0, 0)
    assert Kept.prepared > 0
    sink.write(Kept(0))
    assert sink.stats.lost == 1, "nothing is taken after the end"
