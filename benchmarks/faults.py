"""What the store survives: kill -9 at random moments, a full disk, a dead sidecar, many readers.

Every row of the made-up loads follows from its step and rank, so a checker recomputes what it reads: nothing
torn, nothing twice, nothing missing that was acknowledged (a `flush()` returned).

    python benchmarks/faults.py --kills 200 --soak-seconds 600 --out faults.json
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import logging
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from bench_report import Bar, machine, publish

from moeviz.records import LayerInfo, LoadRecord, ModelInfo
from moeviz.store import BackgroundSink, RunInfo, SegmentWriter, Store, create_run, open_run, resume_run
from moeviz.store import writer as writer_module
from moeviz.store.compact import Rules, compact_run

L, E, K = 4, 8, 2
STALE_SECONDS = 1.0


def load(step: int, rank: int) -> LoadRecord:
    counts_LE = np.arange(L * E, dtype=np.int64).reshape(L, E) + step % 1000 + 7 * rank
    return LoadRecord(step=step, rank=rank, ts=time.time(), tokens=100, counts_LE=counts_LE)


def new_run(path: Path, ranks: int = 1) -> Path:
    layers = tuple(
        LayerInfo(layer=at, name=f"layers.{at}.gate", block=at, num_experts=E, top_k=K) for at in range(L)
    )
    return create_run(
        path, RunInfo(name="faults", model=ModelInfo(family="faults", layers=layers), ranks=ranks)
    )


def wrong_steps(store: Store, rank: int, acknowledged: int) -> int:
    """Steps 0..acknowledged of a rank that are missing, repeated or not what was written."""
    rows = store.frame(
        lambda: (
            f"SELECT step, layer, counts FROM {store.source('expert_load')} WHERE rank = {rank} ORDER BY ALL"
        )
    )
    good = 0
    for step, group in rows[rows["step"] <= acknowledged].groupby("step"):
        counts_LE = np.stack(group["counts"].to_list())
        good += np.array_equal(counts_LE, load(int(step), rank).counts_LE)
    return acknowledged + 1 - good


# Children: one role each, told apart by the first argument.


def write_forever(path: Path, rank: int, first: int, pause: float) -> None:
    """Write steps from `first` on; print each one that is acknowledged."""
    sink = BackgroundSink(SegmentWriter(path, rank, flush_seconds=0.02, sidecar=False), flush_seconds=0.02)
    for step in itertools.count(first):
        sink.write(load(step, rank))
        if step % 5 == 4 and sink.flush():
            print(step, flush=True)
        time.sleep(pause)


def write_for(path: Path, rank: int, seconds: float) -> None:
    """Write a step every 20 ms as training does: nobody waits for a flush. Print the last one at the end."""
    sink, end = (
        BackgroundSink(SegmentWriter(path, rank, sidecar=False), flush_seconds=0.5),
        time.time() + seconds,
    )
    step = -1
    while time.time() < end:
        step += 1
        sink.write(load(step, rank))
        time.sleep(0.02)
    sink.close()
    print(json.dumps({"last": step, "errors": sink.stats.errors, "lost": sink.stats.lost}))


def read_for(path: Path, seconds: float, ranks: int) -> None:
    """Ask again and again; print what was wrong, and how old a step was when it was first seen."""
    end, newest = time.time() + seconds, dict.fromkeys(range(ranks), -1)
    told: dict[str, Any] = {"polls": 0, "errors": 0, "repeated": 0, "holes": 0, "lags": []}
    with open_run(path) as store:
        while time.time() < end:
            try:
                _poll(store, newest, told)
            except Exception:
                logging.exception("a reader failed")
                told["errors"] += 1
            time.sleep(0.1)
    print(json.dumps(told))


def _poll(store: Store, newest: dict[int, int], told: dict[str, Any]) -> None:
    rows = store.frame(
        lambda: f"SELECT rank, step, ts FROM {store.source('expert_load')} WHERE layer = 0 ORDER BY ALL"
    )
    now = time.time()
    told["polls"] += 1
    for rank, group in rows.groupby("rank"):
        steps = group["step"].to_numpy()
        told["repeated"] += len(steps) - len(np.unique(steps))
        told["holes"] += int(steps.max()) + 1 - len(np.unique(steps))
        told["holes"] += max(0, newest[int(rank)] - int(steps.max()))
        fresh = group[group["step"] > newest[int(rank)]]
        if newest[int(rank)] >= 0:  # what was there before the first look says nothing about lag
            told["lags"] += [round(now - ts, 3) for ts in fresh["ts"]]
        newest[int(rank)] = int(steps.max())


def _child(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


# Trials: each gives a row.


def killed_writers(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """kill -9 a writer at a random moment, look, resume, again."""
    path, rng = new_run(folder / "killed"), random.Random(seed)
    first, wrong, unopened, rows = 0, 0, 0, 0
    for _ in range(kills):
        resume_run(path, first)
        child = _child("writer", path, 0, first, 0.002)
        assert child.stdout is not None
        acknowledged = int(child.stdout.readline())
        time.sleep(rng.uniform(0, 0.3))
        child.kill()
        told = child.stdout.read().split("\n")[:-1]  # a line that was cut off acknowledges nothing
        child.wait()
        acknowledged = max([acknowledged, *map(int, told)])
        try:
            with open_run(path) as store:
                wrong += wrong_steps(store, 0, acknowledged) + len(store.notes)
        except Exception:
            logging.exception("a killed run did not open")
            unopened += 1
        compact_run(path, Rules(fan_in=4, delay_seconds=0, grace_seconds=0))
        rows, first = acknowledged + 1, acknowledged + 1
    return _row("kill -9 of the writer", kills, rows, wrong, f"{unopened} runs did not open", unopened)


def full_disk(folder: Path, seconds: float) -> dict[str, Any]:
    """Every write of a segment fails with ENOSPC for a while, then the disk has room again."""
    path = new_run(folder / "full")
    sink = BackgroundSink(SegmentWriter(path, flush_seconds=0.05, sidecar=False), flush_seconds=0.05)
    refusals = itertools.count()

    def refuse(*_: object, **__: object) -> Path:
        next(refusals)
        raise OSError(errno.ENOSPC, "No space left on device")

    raised, end, step = 0, time.monotonic() + seconds, -1
    with patch.object(writer_module, "write_segment", refuse):
        while time.monotonic() < end:
            step += 1
            try:
                sink.write(load(step, 0))
            except Exception:
                raised += 1
            time.sleep(0.001)
    stats = sink.close()
    with open_run(path) as store:
        wrong = wrong_steps(store, 0, step) + stats.lost
        said = len(store.frame(lambda: f"FROM {store.source('events')} WHERE kind = 'recording_failed'"))
    detail = f"{raised} raised, write() at most {1e3 * stats.max_write_seconds:.2f} ms, {said} events"
    return _row("disk full, then not", next(refusals), step + 1, wrong + (said == 0), detail, raised)


def dead_sidecar(folder: Path, times: int, seed: int) -> dict[str, Any]:
    """kill -9 the merging process at random moments while there is much to merge."""
    path, rng = new_run(folder / "sidecar"), random.Random(seed)
    writer, steps, wrong = SegmentWriter(path, sidecar=False), 0, 0
    for _ in range(times):
        for step in range(steps, steps + 64):
            writer.write(load(step, 0))
            writer.flush()
        steps += 64
        child = subprocess.Popen(
            [sys.executable, "-m", "moeviz.store.compact", str(path), "--interval", "0.5"]
        )
        _wait_for_merge(path)
        time.sleep(rng.uniform(0, 0.1))
        child.kill()
        child.wait()
        with open_run(path) as store:
            wrong += wrong_steps(store, 0, steps - 1)
    writer.close()
    merged = compact_run(path, Rules(delay_seconds=0, grace_seconds=0))
    with open_run(path) as store:
        wrong += wrong_steps(store, 0, steps - 1)
    return _row("kill -9 of the sidecar", times, steps, wrong, f"next pass merged {merged.merged} files", 0)


def _wait_for_merge(path: Path) -> None:
    """Until a merged file of loads that was not there appears, perhaps half written; at most 20 s."""
    folder, end = path / "expert_load", time.monotonic() + 20
    before = {file.name for file in folder.iterdir()}
    while time.monotonic() < end:
        if any("-l1-" in file.name for file in folder.iterdir() if file.name not in before):
            return
        time.sleep(0.005)


def soak(folder: Path, seconds: float, writers: int, readers: int) -> tuple[dict[str, Any], float]:
    """Writers and readers at once, with a merge every 2 s. Returns the row, and the 95th percentile of lag."""
    path = new_run(folder / "soak", writers)
    writing = [_child("for", path, rank, seconds) for rank in range(writers)]
    reading = [_child("reader", path, seconds, writers) for _ in range(readers)]
    merged, rules = 0, Rules(fan_in=4, delay_seconds=1, grace_seconds=10)
    while any(child.poll() is None for child in writing):
        merged += compact_run(path, rules).merged
        time.sleep(2)
    wrote = [json.loads(child.communicate()[0]) for child in writing]
    read = [json.loads(child.communicate()[0]) for child in reading]
    with open_run(path) as store:
        wrong = sum(wrong_steps(store, rank, one["last"]) for rank, one in enumerate(wrote))
    faults = sum(one["errors"] + one["repeated"] + one["holes"] for one in read)
    faults += sum(one["errors"] + one["lost"] for one in wrote)
    lag = float(np.quantile([lag for one in read for lag in one["lags"]], 0.95))
    detail = f"{faults} errors, repeats or holes seen by readers; lag p95 {lag:.2f} s; {merged} files merged"
    polls, steps = sum(one["polls"] for one in read), sum(one["last"] + 1 for one in wrote)
    return _row(f"{writers} writers, {readers} readers", polls, steps, wrong, detail, faults), lag


def _row(trial: str, count: int, steps: int, wrong: int, detail: str, faults: int) -> dict[str, Any]:
    return {
        "trial": trial,
        "times": count,
        "steps checked": steps,
        "wrong steps": int(wrong),
        "other faults": int(faults),
        "detail": detail,
    }


def run_trials(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], list[Bar]]]:
    """A row and its bars for each trial."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for row in (
            killed_writers(folder, options.kills, options.seed),
            full_disk(folder, 3.0),
            dead_sidecar(folder, max(3, options.kills // 10), options.seed),
        ):
            yield row, [_none(row)]
        row, lag = soak(folder, options.soak_seconds, options.writers, options.readers)
        yield row, [_none(row), Bar(what="lag of a reader, p95", value=lag, at_most=STALE_SECONDS, unit="s")]


def _none(row: dict[str, Any]) -> Bar:
    faults = row["wrong steps"] + row["other faults"]
    return Bar(what=f"{row['trial']}: faults", value=faults, at_most=0, unit="")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        role, path, *rest = sys.argv[2:]
        if role == "writer":
            write_forever(Path(path), int(rest[0]), int(rest[1]), float(rest[2]))
        elif role == "for":
            write_for(Path(path), int(rest[0]), float(rest[1]))
        else:
            read_for(Path(path), float(rest[0]), int(rest[1]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="of the writer (default 20)")
    parser.add_argument("--soak-seconds", type=float, default=30, help="with readers attached (default 30)")
    parser.add_argument("--writers", type=int, default=2)
    parser.add_argument("--readers", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    before = machine()
    trials = list(run_trials(options))
    rows, bars = [row for row, _ in trials], [bar for _, each in trials for bar in each]
    publish("faults: what the store survives", rows, bars, before, options.out)
    if any(row["wrong steps"] or row["other faults"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
