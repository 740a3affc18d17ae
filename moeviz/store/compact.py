"""Merging small segments into few: the sidecar of a long run.

A flush a second makes 3,600 files an hour and table. Sixteen or more neighbours become one file of the next
level (0 -> 1 -> 2), sorted for reading (see `tiles`). The merged file counts only from a few seconds
after it appears, and what it covers is deleted a minute after that (see `cover`), so no reader ever misses or
repeats a row.

    python -m moeviz.store.compact RUN [--once]

Needs pyarrow alone. One process a run works at a time, under a lock that dies with it; a second one leaves at
once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from moeviz.store.cover import SegmentName, cover
from moeviz.store.detail import write_detail
from moeviz.store.run import read_info
from moeviz.store.schema import TABLES
from moeviz.store.segments import is_whole, read_segment, segment_names, write_segment
from moeviz.store.tiles import has_tiles, tiled

LOCK_FILE = ".compact.lock"
TOP_LEVEL = 2


class Rules(NamedTuple):
    """When files are merged and deleted."""

    fan_in: int = 16
    """Neighbours of one level that make a merge worthwhile."""
    most: int = 32
    """Files that one merge takes at most."""
    max_bytes: int = 128_000_000
    """Size on disk that a merged file may reach: all of it is sorted in memory."""
    delay_seconds: float = 5.0
    """From the merge until readers take the merged file. Above clock skew plus attribute-cache time of a
    shared file system."""
    grace_seconds: float = 60.0
    """From then until the covered files are deleted: the longest query."""


RULES = Rules()


class Compacted(NamedTuple):
    """What one pass did."""

    merged: int
    """Files that went into merged ones."""
    written: int
    deleted: int


@contextlib.contextmanager
def run_lock(path: Path, wait_seconds: float = 0.0) -> Iterator[bool]:
    """Hold the run's maintenance lock; False when another process has it. POSIX only."""
    import fcntl

    with open(path / LOCK_FILE, "w") as file:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= deadline:
                    yield False
                    return
                time.sleep(0.1)
        yield True  # closing the file releases the lock


def compact_run(path: str | Path, rules: Rules = RULES, now: float | None = None) -> Compacted:
    """One pass over all tables: merge what is ripe, write levels of detail, delete what is long covered.

    Args:
        path: run folder.
        rules: when to merge and delete.
        now: seconds since the epoch; the clock's when None.

    Returns: what was done; all zero when another process holds the lock or the run is packed.
    """
    path = Path(path)
    with run_lock(path) as held:
        if not held or read_info(path).packed:
            return Compacted(0, 0, 0)
        totals = np.zeros(3, dtype=int)
        for table in TABLES:
            totals += _compact_table(path / table, table, rules, time.time() if now is None else now)
        write_detail(path, time.time() if now is None else now)
        return Compacted(*totals.tolist())


def _compact_table(folder: Path, table: str, rules: Rules, now: float) -> tuple[int, int, int]:
    for leftover in folder.glob(".r*-l[12]-*.tmp"):  # of a merge that was killed: the lock is ours now
        leftover.unlink(missing_ok=True)
    names = segment_names(folder)
    merged = written = 0
    for group in _ripe(folder, names, rules):
        _merge(folder, table, group, now + rules.delay_seconds)
        merged += len(group)
        written += 1
    superseded = _superseded(names, now - rules.grace_seconds)
    for name in superseded:
        with contextlib.suppress(FileNotFoundError):
            (folder / str(name)).unlink()
    return merged, written, len(superseded)


def _ripe(folder: Path, names: Sequence[str], rules: Rules) -> Iterator[list[SegmentName]]:
    """Groups of neighbours to merge, judged as if every merged file were active already."""
    chosen = sorted(one.name for one in cover(names, now=float("inf")))
    group: list[SegmentName] = []
    size = 0
    for name in chosen:
        path = folder / str(name)
        try:
            usable = name.level < TOP_LEVEL and is_whole(path)
            bytes_here = path.stat().st_size
        except FileNotFoundError:
            usable, bytes_here = False, 0
        usable = usable and bytes_here < rules.max_bytes / 2
        fits = bool(group) and _adjoin(group[-1], name) and len(group) < rules.most
        if group and not (usable and fits and size + bytes_here <= rules.max_bytes):
            if len(group) >= rules.fan_in or (len(group) > 1 and size > rules.max_bytes / 2):
                yield group
            group, size = [], 0
        if usable:
            group.append(name)
            size += bytes_here
    if len(group) >= rules.fan_in:
        yield group


def _adjoin(left: SegmentName, right: SegmentName) -> bool:
    return (left.rank, left.attempt, left.level) == (right.rank, right.attempt, right.level) and (
        left.last_flush + 1 == right.first_flush
    )


def _merge(folder: Path, table: str, group: Sequence[SegmentName], active_at: float) -> None:
    parts = [read_segment(folder, name) for name in group]
    rows, order = pa.concat_tables(parts).combine_chunks(), TABLES[table].order
    row_groups = None
    if has_tiles(order):
        rows, row_groups = tiled(rows, order)
    else:
        rows = rows.sort_by([(column, "ascending") for column in order])
    first, last = group[0], group[-1]
    name = first._replace(
        last_flush=last.last_flush,
        first_step=min(one.first_step for one in group),
        last_step=max(one.last_step for one in group),
        level=first.level + 1,
        active_ms=int(active_at * 1000),
    )
    write_segment(folder, name, rows, sync=True, row_groups=row_groups)


def _superseded(names: Sequence[str], then: float) -> list[SegmentName]:
    """Files that no reader who listed the folder since `then` can have chosen."""
    parsed = [name for text in names if (name := SegmentName.parse(text)) is not None]
    chosen = [one.name for one in cover(names, then)]
    return [
        name
        for name in parsed
        if (name.level == 0 or name.active_ms <= then * 1000)
        and name not in chosen
        and any(_covers(big, name) for big in chosen if big.level > 0 and big.active_ms <= then * 1000)
    ]


def _covers(big: SegmentName, small: SegmentName) -> bool:
    return (big.rank, big.attempt) == (small.rank, small.attempt) and (
        big.first_flush <= small.first_flush and small.last_flush <= big.last_flush
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The sidecar: a pass every `--interval` seconds until the parent is gone or the run is packed."""
    parser = argparse.ArgumentParser(
        prog="python -m moeviz.store.compact", description="Merge a run's segments."
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--once", action="store_true", help="one pass, then leave")
    parser.add_argument("--interval", type=float, default=20.0, help="seconds between passes (default 20)")
    parser.add_argument("--parent", type=int, help="leave when this process is gone")
    options = parser.parse_args(argv)
    with contextlib.suppress(OSError):
        os.nice(19)
    while True:
        done = compact_run(options.run)
        if options.once:
            sys.stdout.write(f"{done.merged} files merged into {done.written}, {done.deleted} deleted\n")
            return 0
        deadline = time.monotonic() + options.interval
        while time.monotonic() < deadline:
            if options.parent is not None and os.getppid() != options.parent:
                return 0
            time.sleep(0.5)
        if read_info(options.run).packed:
            return 0


if __name__ == "__main__":
    raise SystemExit(main())
