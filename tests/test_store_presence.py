"""Rows become visible often while somebody looks, and seldom while nobody does."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from store_runs import Step, new_run

from moeviz.records import ScalarRecord
from moeviz.store.background import BackgroundSink
from moeviz.store.pack import pack_run
from moeviz.store.presence import PRESENCE_FILE, Attention, Presence
from moeviz.store.reader import open_run
from moeviz.store.writer import SegmentWriter


class Clock:
    """Seconds, as the modules under test see them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("moeviz.store.presence.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def older(path: Path, seconds: float) -> None:
    """A file system may tell times by the clock tick: what was told before lies seconds back."""
    stat = path.stat()
    os.utime(path, (stat.st_atime - seconds, stat.st_mtime - seconds))


def test_a_query_is_noticed_and_forgotten(tmp_path: Path, clock: Clock) -> None:
    run = new_run(tmp_path / "run")
    older_file = Presence(run)
    older(run / PRESENCE_FILE, 60)
    presence = Presence(run)
    assert not presence.is_read()
    with open_run(run) as store:
        assert presence.is_read()
        clock.now += 9
        assert presence.is_read()
        clock.now += 2
        assert not presence.is_read()
        older(run / PRESENCE_FILE, 60)
        assert presence.is_read(), "another reader told, whose clock is behind"
        clock.now += 11
        assert not presence.is_read()
        store.sql("SELECT count(*) FROM scalars")
        assert presence.is_read()
    older_file.close()
    assert not (run / PRESENCE_FILE).exists()
    presence.close()


def test_a_reader_tells_once_a_second_and_makes_no_file(tmp_path: Path, clock: Clock) -> None:
    attention = Attention(tmp_path)
    attention.tell()
    assert not [*tmp_path.iterdir()]
    Presence(tmp_path)
    file = tmp_path / PRESENCE_FILE
    older(file, 60)
    before = file.stat().st_mtime_ns
    attention.tell()
    assert file.stat().st_mtime_ns == before, "it told, in vain, in this second"
    clock.now += 1
    attention.tell()
    assert file.stat().st_mtime_ns > before


def test_a_packed_run_is_read_without_a_trace(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    writer = SegmentWriter(run, sidecar=False)
    for record in Step(0).records():
        writer.write(record)
    writer.close()
    pack_run(run, force=True)
    Presence(run)
    older(run / PRESENCE_FILE, 60)
    before = (run / PRESENCE_FILE).stat().st_mtime_ns
    with open_run(run) as store:
        assert len(store.sql("SELECT * FROM expert_load")) > 0
    assert (run / PRESENCE_FILE).stat().st_mtime_ns == before


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    presence = Presence(tmp_path / "nowhere")
    assert not presence.is_read()
    Attention(tmp_path / "nowhere").tell()
    presence.close()


class Flushes:
    """A sink that counts them."""

    def __init__(self) -> None:
        self.count = 0

    def write(self, record: object) -> None: ...

    def flush(self) -> None:
        self.count += 1

    def close(self) -> None: ...


def wait_for(condition: Callable[[], bool]) -> bool:
    patience = time.monotonic() + 60
    while not condition() and time.monotonic() < patience:
        time.sleep(0.005)
    return condition()


def test_a_reader_who_comes_hastens_the_flush() -> None:
    inner, read = Flushes(), threading.Event()
    sink = BackgroundSink(inner, flush_seconds=0.0, is_read=read.is_set, unread_flush_seconds=1e9)
    sink.write(ScalarRecord(step=0, rank=0, ts=0.0, values={"loss": 1.0}))
    time.sleep(0.6)
    assert inner.count == 0
    read.set()
    assert wait_for(lambda: inner.count == 1)
    read.clear()
    assert sink.flush(60.0), "what is asked for does not wait"
    sink.close()


def test_nobody_reads_and_yet_it_is_written() -> None:
    inner = Flushes()
    sink = BackgroundSink(inner, flush_seconds=0.0, is_read=lambda: False, unread_flush_seconds=0.01)
    for step in range(3):
        sink.write(ScalarRecord(step=step, rank=0, ts=0.0, values={"loss": 1.0}))
        assert wait_for(lambda: inner.count > step)  # noqa: B023  # called before the next step
    sink.close()
