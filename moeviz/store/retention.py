"""What old runs cost and which may go: a plan first, deletion after.

A run counts as alive while it writes, while it could still write by its own rhythm, or while the process that
started it exists on this machine. A living run is never touched. Whatever cannot be read is left alone: nobody
knows what it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moeviz.errors import MoevizError
from moeviz.store.catalog import find_runs
from moeviz.store.compact import run_lock
from moeviz.store.cover import SegmentName
from moeviz.store.export import open_tables, write_tables
from moeviz.store.queries_runs import DEAD_SECONDS, has_ended, run_state, step_rhythm
from moeviz.store.queries_series import events
from moeviz.store.reader import Store, open_run
from moeviz.store.run import DATABASE_FILE, RunInfo, read_info
from moeviz.store.schema import TABLES, segment_schema
from moeviz.store.segments import segment_names, sync_folder, write_segment

SAMPLED = tuple(name for name, table in TABLES.items() if table.sampled)
"""Tables that `drop_samples` empties: routing, sequences, attention, latents."""

_ELSEWHERE_SECONDS = 86_400.0
"""Silence after which a run of another machine that did not say it ended counts as dead: the first step of a large
model takes long."""

Verdict = Literal["keep", "delete", "drop samples"]


@dataclass(frozen=True, kw_only=True)
class Holding:
    """One run, what it takes on the disk, and what is to become of it."""

    path: Path
    written: float
    """When its newest file was written, seconds since the epoch."""
    bytes: int
    checkpoint_bytes: int
    """Of `bytes`, those of its checkpoints."""
    sample_bytes: int
    """Of `bytes`, those of sampled tables; of a packed run their share is known only after."""
    verdict: Verdict
    reason: str


def plan(
    folder: str | Path,
    *,
    keep_last: int | None = None,
    older_than_seconds: float | None = None,
    drop_samples: bool = False,
    now: float | None = None,
) -> list[Holding]:
    """What the rules say about each run directly in `folder`, newest first. A run must meet every rule given.

    Args:
        folder: of runs.
        keep_last: leave this many of the newest runs alone.
        older_than_seconds: leave runs alone that were written since.
        drop_samples: the runs stay, and lose their token-level rows and attention maps.
        now: seconds since the epoch; the clock's when None.

    Raises:
        MoevizError: no rule, or a negative one.
    """
    if keep_last is None and older_than_seconds is None and not drop_samples:
        raise MoevizError("no rule says what may go; give --keep-last, --older-than or --drop-samples")
    if min(keep_last or 0, older_than_seconds or 0) < 0:
        raise MoevizError(
            f"keep_last={keep_last}, older_than={older_than_seconds}: neither may be negative; give 0 or more"
        )
    now = time.time() if now is None else now
    planned = []
    for rank, (path, _) in enumerate(find_runs(folder)):
        written, size = _extent(path)
        reason = _spared(path, now)
        if reason is None and keep_last is not None and rank < keep_last:
            reason = f"one of the newest {keep_last}"
        if reason is None and older_than_seconds is not None and now - written < older_than_seconds:
            reason = "written too recently"
        samples = sum(_extent(path / table)[1] for table in SAMPLED)
        if reason is None and drop_samples and not _has_samples(path):
            reason = "has no samples"
        verdict: Verdict = "keep" if reason is not None else ("drop samples" if drop_samples else "delete")
        planned.append(
            Holding(
                path=path,
                written=written,
                bytes=size,
                checkpoint_bytes=_extent(path / "checkpoints")[1],
                sample_bytes=samples,
                verdict=verdict,
                reason=reason or "",
            )
        )
    return planned


def carry_out(holdings: Sequence[Holding]) -> int:
    """Do what the verdicts say, each after a last look that the run is not alive. Returns the bytes freed.

    Raises:
        MoevizError: a run came alive, or another process is merging or packing it. Those before it are done.
    """
    freed = 0
    for holding in holdings:
        if holding.verdict == "keep":
            continue
        spared = _spared(holding.path, time.time())
        if spared is not None:
            raise MoevizError(f"{holding.path} is left alone: {spared}; try again when it ended")
        with run_lock(holding.path, wait_seconds=5.0) as held:
            if not held:
                raise MoevizError(
                    f"another process is merging or packing {holding.path}; try again when it is done"
                )
            if holding.verdict == "delete":
                _delete(holding.path)
                freed += holding.bytes
            else:
                _drop_samples(holding.path)
                freed += holding.bytes - _extent(holding.path)[1]
    return freed


def _spared(path: Path, now: float) -> str | None:
    """Why a run must not be touched; None if it may be."""
    if path.is_symlink():
        return "a link; delete it where it lies"
    try:
        with open_run(path) as store:
            if has_ended(store):
                return None
            last_ts, interval = step_rhythm(store)
            state = run_state(last_ts, interval, False, now)
            if state in ("live", "stale"):
                return f"{state}: it did not say that it ended"
            silent = now - _extent(path)[0]
            if silent < DEAD_SECONDS:
                return "written a moment ago"
            return _process(store, silent)
    except MoevizError as error:
        return f"unreadable ({error})"


def _process(store: Store, silent: float) -> str | None:
    """Why the process that began the newest attempt may still write; None if it cannot."""
    said = events(store).query("kind in ('started', 'resumed')")
    if said.empty:
        return None
    detail = json.loads(said["detail"].iloc[-1])
    if detail.get("host", platform.node()) != platform.node():  # its process cannot be seen from here
        return "of another machine, silent for less than a day" if silent < _ELSEWHERE_SECONDS else None
    pid = detail.get("pid")
    if type(pid) is not int or pid <= 0:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "its process still runs"


def _has_samples(path: Path) -> bool:
    with open_run(path) as store:
        return any(store.newest_step(table) is not None for table in SAMPLED)


def _delete(path: Path) -> None:
    """Out of sight first, at once: a listing never shows half a run."""
    hidden = path.with_name(f".{path.name}.deleting")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def _drop_samples(path: Path) -> None:
    info = read_info(path)
    if info.packed:
        _rebuild(path)
        return
    for table in SAMPLED:
        folder = path / table
        folder.mkdir(exist_ok=True)
        _announce(folder, table, info)
        for text in segment_names(folder):
            name = SegmentName.parse(text)
            if name is not None and name.last_flush > 0:
                with contextlib.suppress(FileNotFoundError):
                    (folder / text).unlink()


def _announce(folder: Path, table: str, info: RunInfo) -> None:
    """The empty file of the newest attempt, where unpacking left none: older DuckDB takes no empty folder."""
    attempt = info.attempts[-1]
    name = SegmentName(
        0,
        attempt.number,
        attempt.from_step,
        0,
        0,
        attempt.from_step,
        attempt.from_step,
        0,
        int(time.time() * 1000),
    )
    if not any(
        (found := SegmentName.parse(text)) and found.last_flush == 0 for text in segment_names(folder)
    ):
        write_segment(folder, name, segment_schema(table, info.run_id).empty_table())


def _rebuild(path: Path) -> None:
    """A packed file without the samples, beside the old one and then in its place: rows deleted in it stay on disk."""
    temporary = path / f".{DATABASE_FILE}.tmp"
    temporary.unlink(missing_ok=True)
    try:
        with open_run(path) as store:
            connection = open_tables(store, empty=SAMPLED)
            try:
                write_tables(connection, store, temporary, [*TABLES, "vocab"])
            finally:
                connection.close()
        os.replace(temporary, path / DATABASE_FILE)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path)


def _extent(folder: Path) -> tuple[float, int]:
    """Newest time and total bytes of the files below `folder`; hidden files count as bytes alone."""
    newest, size = 0.0, 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                stat = os.lstat(os.path.join(parent, name))
                size += stat.st_size
                if not name.startswith("."):
                    newest = max(newest, stat.st_mtime)
    return newest, size
