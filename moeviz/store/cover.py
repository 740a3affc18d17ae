"""Which files of a table are read: a pure function of their names.

A segment's name says what it holds: writer (rank, attempt and the step the attempt starts at), the range of
that writer's flushes, the range of steps, the level of merging and the time from which it counts. Flush
numbers, not steps, decide what covers what: two flushes may hold rows of one step, but never the same row.
Flush 0 is an empty file that announces an attempt; rows begin with flush 1.

    r0-a1.500-n3.18-s512.977-l1-1763786621123.parquet

A merged file becomes active seconds after it appears, and what it covers is deleted a minute later. So every
reader that lists the folder finds each row exactly once, whatever a writer or a merger does meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

_PATTERN = re.compile(
    r"r(\d+)-a(\d+)\.(-?\d+)-n(\d+)\.(\d+)-s(-?\d+)\.(-?\d+)-l(\d+)-(\d+)\.parquet", re.ASCII
)


class SegmentName(NamedTuple):
    """The facts in one file name; `str()` gives the name back."""

    rank: int
    attempt: int
    from_step: int
    """First step of the attempt: rows of older attempts from this step on are superseded."""
    first_flush: int
    last_flush: int
    first_step: int
    last_step: int
    level: int
    """0 as flushed, 1 and 2 merged."""
    active_ms: int
    """Milliseconds since the epoch from which a merged file counts."""

    def __str__(self) -> str:
        return (
            f"r{self.rank}-a{self.attempt}.{self.from_step}-n{self.first_flush}.{self.last_flush}"
            f"-s{self.first_step}.{self.last_step}-l{self.level}-{self.active_ms}.parquet"
        )

    @staticmethod
    def parse(name: str) -> SegmentName | None:
        """None for anything that is not a segment: temporary files, notes of other programs."""
        return _parse(name)


@lru_cache(maxsize=1 << 16)  # a folder of 10,000 files is listed again every second
def _parse(name: str) -> SegmentName | None:
    match = _PATTERN.fullmatch(name)
    return SegmentName(*map(int, match.groups())) if match else None


class Covered(NamedTuple):
    """A file to read, and the step from which its rows are superseded by a later attempt (None: none are)."""

    name: SegmentName
    below_step: int | None


def cover(names: Iterable[str], now: float) -> list[Covered]:
    """The files that hold every live row exactly once, in order of (rank, attempt, flush).

    Args:
        names: file names of one table's folder; names that are no segments are ignored.
        now: seconds since the epoch. A merged file that is not active yet stands back behind what it covers, and
            counts only where nothing else holds its rows (the clock that deleted them was ahead of this one).
    """
    parsed = [name for text in names if (name := SegmentName.parse(text)) is not None]
    waiting = {name for name in parsed if name.level > 0 and name.active_ms > now * 1000}
    parsed.sort(
        key=lambda n: (n.rank, n.attempt, n.first_flush, n in waiting, -n.last_flush, -n.level, n.active_ms)
    )
    cuts = _cuts({name.attempt: name.from_step for name in parsed})
    chosen: list[Covered] = []
    writer, covered_to = (-1, -1), -1
    for name in parsed:
        if (name.rank, name.attempt) != writer:
            writer, covered_to = (name.rank, name.attempt), -1
        if name.first_flush <= covered_to:
            continue
        covered_to = name.last_flush
        cut = cuts[name.attempt]
        if cut is None or name.last_step < cut:
            chosen.append(Covered(name, None))
        elif name.first_step < cut:
            chosen.append(Covered(name, cut))
    return chosen


def _cuts(starts: dict[int, int]) -> dict[int, int | None]:
    """First step of each attempt -> the step from which its rows are superseded by a later one."""
    cuts: dict[int, int | None] = {}
    earliest: int | None = None
    for attempt in sorted(starts, reverse=True):
        cuts[attempt] = earliest
        earliest = starts[attempt] if earliest is None else min(earliest, starts[attempt])
    return cuts


def holes(names: Iterable[str]) -> list[tuple[int, int, int, int]]:
    """Flushes that no file holds, as (rank, attempt, first, last): files that got lost on the way here."""
    found: list[tuple[int, int, int, int]] = []
    writer, expected = (-1, -1), 1
    parsed = sorted(
        (n.rank, n.attempt, n.first_flush, n.last_flush)
        for text in names
        if (n := SegmentName.parse(text)) is not None
    )
    for rank, attempt, first, last in parsed:
        if (rank, attempt) != writer:
            writer, expected = (rank, attempt), 1
        if first > expected:
            found.append((rank, attempt, expected, first - 1))
        expected = max(expected, last + 1)
    return found
