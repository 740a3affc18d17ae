"""The trials of `faults.py`, each a function that gives one row: what was done, what was checked, what was wrong."""

from __future__ import annotations

import errno
import itertools
import logging
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from faults_run import (
    load,
    merge_forever,
    new_run,
    read_for,
    received,
    sample,
    start,
    write_for,
    write_forever,
    wrong_steps,
)

from moeviz.store import BackgroundSink, SegmentWriter, open_run, resume_run
from moeviz.store import writer as writer_module
from moeviz.store.compact import Rules, compact_run

Row = dict[str, Any]
_SKEWS = (300.0, -300.0)


def killed_writers(folder: Path, kills: int, seed: int, lanes: int = 4) -> Row:
    """kill -9 writers at random moments, look, resume, again; `lanes` runs at a time.

    Three of four live for up to half a second after their first acknowledged step, the others from their start.
    """
    rng = random.Random(seed)
    paths = [new_run(folder / f"killed{lane}") for lane in range(lanes)]
    first = dict.fromkeys(paths, 0)
    done = wrong = unopened = checked = 0
    while done < kills:
        lives = []
        for path in paths[: kills - done]:
            resume_run(path, first[path])
            lives.append((path, *start(write_forever, path, 0, first[path], 0.002)))
        for path, process, told in lives:
            if rng.random() < 0.75:
                told.poll(60)
            time.sleep(rng.uniform(0, 0.5 / lanes))
            process.kill()
            process.join()
            acknowledged = max([first[path] - 1, *received(told)])
            faults = _faults_of(path, acknowledged)
            wrong, unopened = wrong + (faults or 0), unopened + (faults is None)
            checked += acknowledged + 1
            first[path] = acknowledged + 1
            done += 1
        for path in paths:
            compact_run(path, Rules(fan_in=4, delay_seconds=0, grace_seconds=0))
    detail = f"{lanes} runs, {sum(first.values()):,} steps in the end; {unopened} did not open"
    return row("kill -9 of the writer", done, checked, wrong, detail, unopened)


def _faults_of(path: Path, acknowledged: int) -> int | None:
    """Wrong steps and notes of a run; None when it does not open."""
    try:
        with open_run(path) as store:
            return (wrong_steps(store, 0, acknowledged) if acknowledged >= 0 else 0) + len(store.notes)
    except Exception:
        logging.exception("a killed run did not open")
        return None


def full_disk(folder: Path, seconds: float) -> Row:
    """Every write of a segment fails with ENOSPC for a while, then the disk has room again."""
    path = new_run(folder / "full")
    sink = BackgroundSink(SegmentWriter(path, flush_seconds=0.05, sidecar=False), flush_seconds=0.05)
    refusals = itertools.count()

    def refuse(*_: object, **__: object) -> Path:
        next(refusals)
        raise OSError(errno.ENOSPC, "No space left on device")

    with patch.object(writer_module, "write_segment", refuse):
        step, raised = _train(sink, seconds)
    stats = sink.close()
    with open_run(path) as store:
        wrong = wrong_steps(store, 0, step) + stats.lost
        said = len(store.frame(lambda: f"FROM {store.source('events')} WHERE kind = 'recording_failed'"))
    detail = f"{raised} raised, write() at most {1e3 * stats.max_write_seconds:.2f} ms, {said} events"
    return row("disk full, then not", next(refusals), step + 1, wrong + (said == 0), detail, raised)


def slow_disk(folder: Path, seconds: float, file_seconds: float = 0.4) -> Row:
    """Every segment takes `file_seconds` to write. Loads are complete, samples complete or counted as dropped."""
    path, slow = new_run(folder / "slow"), itertools.count()
    sink = BackgroundSink(
        SegmentWriter(path, flush_seconds=0.05, sidecar=False), capacity=200, flush_seconds=0.05
    )
    real = writer_module.write_segment

    def write_slowly(*arguments: Any, **options: Any) -> Path:
        next(slow)
        time.sleep(file_seconds)
        return real(*arguments, **options)

    with patch.object(writer_module, "write_segment", write_slowly):
        step, raised = _train(sink, seconds, samples=True)
        stats = sink.close()
    with open_run(path) as store:
        wrong = wrong_steps(store, 0, step) + stats.lost
        kept = len(store.frame(lambda: f"SELECT DISTINCT step FROM {store.source('routing')}"))
        told = store.frame(
            lambda: f"SELECT detail FROM {store.source('events')} WHERE kind = 'dropped_samples'"
        )
    uncounted = abs(step + 1 - kept - stats.dropped_samples) + (stats.dropped_samples > 0 and told.empty)
    detail = (
        f"{stats.dropped_samples} of {step + 1} samples dropped, {len(told)} events; "
        f"write() at most {1e3 * stats.max_write_seconds:.2f} ms"
    )
    return row("slow disk", next(slow), step + 1, wrong, detail, raised + uncounted)


def _train(sink: BackgroundSink, seconds: float, samples: bool = False) -> tuple[int, int]:
    """Steps of a millisecond. Returns the last one, and how often `write` raised."""
    raised, end, step = 0, time.monotonic() + seconds, -1
    while time.monotonic() < end:
        step += 1
        try:
            if samples:
                sink.write(sample(step))
            sink.write(load(step, 0))
        except Exception:
            raised += 1
        time.sleep(0.001)
    return step, raised


def dead_sidecar(folder: Path, times: int, seed: int) -> Row:
    """kill -9 the merging process while a merged file is half written, then let another one take over."""
    path, rng = new_run(folder / "sidecar"), random.Random(seed)
    writer, steps, wrong, halves, checked = SegmentWriter(path, sidecar=False), 0, 0, 0, 0
    for _ in range(times):
        for step in range(steps, steps + 64):
            writer.write(load(step, 0))
            writer.flush()
        steps += 64
        process, told = start(merge_forever, path, 0.3, 0.0)
        halves += _wait_for_half(path)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.join()
        received(told)
        with open_run(path) as store:
            wrong += wrong_steps(store, 0, steps - 1) + len(store.notes)
        checked += steps
    writer.close()
    merged, late = 0, time.time() + 60
    while files := compact_run(path, Rules(fan_in=2, delay_seconds=0, grace_seconds=0), late).merged:
        merged, late = merged + files, late + 60
    left = len(list(path.glob("expert_load/.*.tmp")))
    with open_run(path) as store:
        wrong += wrong_steps(store, 0, steps - 1)
    detail = f"{halves} in the middle of a merge; the next one merged {merged} files, {left} half files left"
    return row("kill -9 of the sidecar", times, checked + steps, wrong, detail, left + (merged == 0))


def _wait_for_half(path: Path) -> bool:
    """Until a merged file of loads is half written; at most 20 s."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if any((path / "expert_load").glob(".r*-l[12]-*.tmp")):
            return True
        time.sleep(0.002)
    return False


def skewed_clocks(folder: Path, seconds: float) -> Row:
    """Two ranks, five readers and two sidecars that take turns, each on a clock of its own, minutes apart."""
    path = new_run(folder / "skewed", ranks=2)
    writing = [start(write_for, path, rank, seconds, 0.02, ahead) for rank, ahead in enumerate(_SKEWS)]
    reading = [start(read_for, path, seconds, 2, ahead) for ahead in (0.0, *_SKEWS, 7200.0, -7200.0)]
    merged, rules = 0, Rules(fan_in=4, delay_seconds=1, grace_seconds=10)
    for ahead in itertools.cycle(_SKEWS):
        if not any(process.is_alive() for process, _ in writing):
            break
        merged += compact_run(path, rules, time.time() + ahead).merged
        time.sleep(1)
    return _outcome("clocks 5 min and 2 h apart", path, writing, reading, merged)[0]


def soak(folder: Path, seconds: float, writers: int, readers: int) -> tuple[Row, float]:
    """Writers and readers at once, with a merge every 2 s. Returns the row, and the 95th percentile of lag."""
    path = new_run(folder / "soak", writers)
    writing = [start(write_for, path, rank, seconds, 0.05, 0.0) for rank in range(writers)]
    reading = [start(read_for, path, seconds, writers, 0.0) for _ in range(readers)]
    merged, rules = 0, Rules(fan_in=4, delay_seconds=1, grace_seconds=10)
    while any(process.is_alive() for process, _ in writing):
        merged += compact_run(path, rules).merged
        time.sleep(2)
    name = f"{writers} writers, {readers} readers, {seconds:.0f} s"
    return _outcome(name, path, writing, reading, merged)


def _outcome(
    trial: str, path: Path, writing: Sequence[Any], reading: Sequence[Any], merged: int
) -> tuple[Row, float]:
    told = [[received(connection) for _, connection in each] for each in (writing, reading)]
    silent = sum(not said for each in told for said in each)
    wrote, read = ([said[-1] for said in each if said] for each in told)
    with open_run(path) as store:
        wrong = sum(wrong_steps(store, rank, one["last"]) for rank, one in enumerate(wrote))
    seen = {name: sum(one[name] for one in read) for name in ("errors", "repeated", "holes")}
    faults = silent + sum(seen.values()) + sum(one["errors"] + one["lost"] for one in wrote)
    lags = [lag for one in read for lag in one["lags"]]
    lag = float(np.quantile(lags, 0.95)) if lags else float("inf")
    polls, steps = sum(one["polls"] for one in read), sum(one["steps"] for one in read)
    detail = (
        f"{sum(one['last'] + 1 for one in wrote):,} steps written, {merged} files merged; readers: "
        f"{seen['errors']} errors, {seen['repeated']} repeats, {seen['holes']} holes, lag p95 {lag:.2f} s"
    )
    return row(trial, polls, steps, wrong, detail, faults), lag


def row(trial: str, count: int, steps: int, wrong: int, detail: str, faults: int) -> Row:
    return {
        "trial": trial,
        "times": count,
        "steps checked": steps,
        "wrong steps": int(wrong),
        "other faults": int(faults),
        "detail": detail,
    }
