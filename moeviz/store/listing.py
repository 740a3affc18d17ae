"""The files of one table as a reader sees them: listed when the folder changed, checked once, covered."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from moeviz.store.cover import Covered, SegmentName, cover, holes
from moeviz.store.schema import TABLES
from moeviz.store.segments import is_whole, segment_names

_RELIST_SECONDS = 5.0
"""Network file systems may show a folder's old time for seconds: list again after this in any case."""
_CLOCK_TICK_NS = 50_000_000
"""Folder times move in ticks: a folder that changed this recently may change again without showing it."""

_MANY_FILES = 2000
"""Files of one table above which reading becomes slow: its sidecar is dead, or was never started."""

_SQL_TYPES = {
    "int32": "INTEGER",
    "uint8": "UTINYINT",
    "uint16": "USMALLINT",
    "uint32": "UINTEGER",
    "uint64": "UBIGINT",
    "float": "FLOAT",
    "double": "DOUBLE",
    "string": "VARCHAR",
}


class Listing:
    """Which files of one table folder count now. `revision` moves when the answer does."""

    def __init__(self, folder: Path, table: str) -> None:
        self.folder = folder
        self.table = table
        self.revision = 0
        self.notes: list[str] = []
        self.files: list[Covered] = []
        self._whole: set[str] = set()
        self._damaged: set[str] = set()
        self._stamp: tuple[int, int] | None = None
        self._listed_at = -1e9
        self._activation = float("inf")

    def refresh(self, anew: bool = False, thorough: bool = False) -> int:
        """List again if the folder changed, a merged file became active, or `anew`. Returns how many files are new.

        `thorough` decodes every file to find damage inside.
        """
        now = time.time()
        try:
            stat = self.folder.stat()
            stamp = (stat.st_mtime_ns, stat.st_ino)
            settled = time.time_ns() - stat.st_mtime_ns > _CLOCK_TICK_NS
        except FileNotFoundError:
            stamp, settled = (0, 0), True
        fresh = stamp == self._stamp and now < self._activation and now - self._listed_at < _RELIST_SECONDS
        if fresh and not anew:
            return 0
        if thorough:
            self._whole.clear()
        self._stamp = stamp if settled else None
        self._listed_at = now
        names = self._checked(segment_names(self.folder), thorough)
        files = cover(names, now)
        pending = (
            name.active_ms / 1000 for text in names if (name := SegmentName.parse(text)) and name.level > 0
        )
        self._activation = min((at for at in pending if at > now), default=float("inf"))
        new = len({one.name for one in files} - {one.name for one in self.files})
        if files != self.files or self.revision == 0:
            self.files = files
            self.revision += 1
        self.notes = self._find_faults(names)
        return new

    @property
    def readable(self) -> list[str]:
        """Names of all whole files, also those that a merged one covers."""
        return sorted(self._whole)

    def sql(self, first: int | None = None, last: int | None = None) -> str:
        """SQL to stand after FROM: the rows of the files that overlap steps first..last."""
        return self.sql_of(
            one
            for one in self.files
            if (last is None or one.name.first_step <= last)
            and (first is None or one.name.last_step >= first)
        )

    def sql_of(self, files: Iterable[Covered]) -> str:
        """SQL to stand after FROM: the rows of `files`."""
        wanted = list(files)
        whole = [one.name for one in wanted if one.below_step is None]
        parts = [f"SELECT * FROM {self._parquet(whole)}"] if whole else []
        for below in sorted({one.below_step for one in wanted if one.below_step is not None}):
            cut = [one.name for one in wanted if one.below_step == below]
            parts.append(f"SELECT * FROM {self._parquet(cut)} WHERE {end_of_row(self.table)} < {below}")
        if len(parts) == 1 and whole:
            return self._parquet(whole)
        return f"({' UNION ALL '.join(parts)})" if parts else f"({empty_sql(self.table)})"

    def step_range(self) -> tuple[int, int] | None:
        """Smallest and largest step that the names announce; None without rows. Too wide where `cut`."""
        files = [one for one in self.files if one.name.last_flush > 0]
        if not files:
            return None
        lasts = (min(one.name.last_step, (one.below_step or 1 << 31) - 1) for one in files)
        return min(one.name.first_step for one in files), max(lasts)

    @property
    def cut(self) -> bool:
        """Whether some rows of some file are superseded: its name then announces more than counts."""
        return any(one.below_step is not None for one in self.files)

    def _parquet(self, names: list[SegmentName]) -> str:
        folder = str(self.folder).replace("'", "''")
        return (
            "read_parquet(["
            + ", ".join(f"'{folder}/{name}'" for name in names)
            + "], hive_partitioning = false)"
        )

    def _checked(self, names: list[str], thorough: bool) -> list[str]:
        whole: list[str] = []
        self._damaged.intersection_update(names)
        for name in names:
            if name in self._whole:
                whole.append(name)
                continue
            try:
                ok = name not in self._damaged and is_whole(self.folder / name, thorough)
            except FileNotFoundError:  # merged away between listing and looking
                continue
            (self._whole if ok else self._damaged).add(name)
            if ok:
                whole.append(name)
        self._whole.intersection_update(names)
        return whole

    def _find_faults(self, names: list[str]) -> list[str]:
        notes = [f"{self.table}/{name} is damaged and skipped" for name in sorted(self._damaged)]
        if not names and not TABLES[self.table].on_request:
            notes.append(f"{self.table} has no readable files")
        if len(self.files) > _MANY_FILES:
            notes.append(
                f"{self.table} has {len(self.files):,} files; `python -m moeviz.store.compact RUN` merges them"
            )
        for rank, attempt, first, last in holes(names):
            flushes = f"flush {first}" if first == last else f"flushes {first} to {last}"
            notes.append(f"{self.table}: {flushes} of rank {rank}, attempt {attempt} are missing")
        return notes


def empty_sql(table: str) -> str:
    """A SELECT with the columns and types of `table` and no row."""
    columns = ", ".join(f"NULL::{sql_type(str(c.type))} AS {c.name}" for c in TABLES[table].columns)
    return f"SELECT {columns} WHERE false"


def sql_type(arrow: str) -> str:
    """Arrow type name -> DuckDB type name."""
    if arrow.startswith("list<"):
        return sql_type(arrow.removeprefix("list<").removesuffix(">").split(": ")[1]) + "[]"
    return _SQL_TYPES[arrow]


def end_of_row(table: str) -> str:
    """The last step that a row speaks of."""
    return "step + span - 1" if table == "load_lod" else "step"
