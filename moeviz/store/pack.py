"""A finished run as one ordinary DuckDB file: real tables, readable by any client, easy to copy.

    python -m moeviz.store.pack RUN [--unpack] [--keep-segments] [--force]

The file is built beside, checked row by row count against the segments, synced, renamed over run.duckdb; only
then are the segments deleted. A crash at any point leaves a run that opens. Unpacking is the way back, for a
run that is resumed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import duckdb

from moeviz.errors import MoevizError
from moeviz.store.compact import run_lock
from moeviz.store.cover import SegmentName
from moeviz.store.detail import write_detail
from moeviz.store.engine import connect
from moeviz.store.listing import empty_sql
from moeviz.store.queries_runs import DEAD_SECONDS, has_ended
from moeviz.store.reader import Store, packed_tables
from moeviz.store.run import DATABASE_FILE, RunInfo, read_info, write_info
from moeviz.store.schema import SCHEMA_VERSION, TABLES
from moeviz.store.segments import segment_names, sync_folder
from moeviz.store.tiles import packed_order
from moeviz.store.views import DECISIONS_SQL, STORAGE_VERSION, quoted, write_database


class Packed(NamedTuple):
    """What packing did."""

    path: Path
    rows: dict[str, int]
    """By table."""
    bytes: int
    """Of run.duckdb."""
    freed_bytes: int
    """Of the segments that were deleted."""
    seconds: float


def pack_run(path: str | Path, *, keep_segments: bool = False, force: bool = False) -> Packed:
    """Turn run.duckdb from views into tables and delete the segments.

    Args: path: run folder. keep_segments: leave the segments in place; moeviz goes on reading them. force:
        pack a run that did not say it ended and wrote less than two minutes ago. Rows written meanwhile would
        be lost to readers: only for a run whose process is known to be gone.

    Raises:
        MoevizError: packed already, still being written, or the copy does not match.
    """
    path, begin = Path(path), time.monotonic()
    info = read_info(path)
    if info.packed:
        raise MoevizError(f"{path} is packed already; {path / DATABASE_FILE} holds its tables")
    with run_lock(path, wait_seconds=60.0) as held:
        if not held:
            raise MoevizError(f"another process is merging or packing {path}; try again when it is done")
        with Store(path) as store:
            if not force:
                _require_finished(store, path)
            write_detail(path)
            segments = {table: store.segments(table) for table in TABLES}
            packed_info = replace(info, packed=not keep_segments)
            temporary, rows = _build(store, path, replace(info, packed=True))
        os.replace(temporary, path / DATABASE_FILE)
        sync_folder(path)
        write_info(path, packed_info)
        freed = 0 if keep_segments else _delete(path, segments)
    size = (path / DATABASE_FILE).stat().st_size
    return Packed(path / DATABASE_FILE, rows, size, freed, time.monotonic() - begin)


def unpack_run(path: str | Path) -> None:
    """The way back: tables of run.duckdb become segments again, and run.duckdb views. For resuming.

    Raises:
        MoevizError: the run is not packed.
    """
    path = Path(path)
    info = read_info(path)
    if not info.packed:
        raise MoevizError(f"{path} is not packed; there is nothing to unpack")
    with run_lock(path, wait_seconds=60.0) as held:
        if not held:
            raise MoevizError(f"another process is merging or packing {path}; try again when it is done")
        _write_segments(path, info)
        write_info(path, replace(info, packed=False))
        write_database(path)


def _require_finished(store: Store, path: Path) -> None:
    parsed = [SegmentName.parse(name) for table in TABLES for name in segment_names(path / table)]
    silent = time.time() - max((name.active_ms / 1000 for name in parsed if name), default=0.0)
    if silent < DEAD_SECONDS and not has_ended(store):
        raise MoevizError(
            f"{path} was written {silent:.0f} s ago and did not say that it ended; "
            f"wait until it does, or pack with --force when its process is gone"
        )


def _build(store: Store, path: Path, info: RunInfo) -> tuple[Path, dict[str, int]]:
    """Write the packed file beside run.duckdb. Returns its path and the rows of each table."""
    temporary = path / f".{DATABASE_FILE}.tmp"
    for leftover in (temporary, temporary.with_name(temporary.name + ".wal")):
        leftover.unlink(missing_ok=True)
    connection = connect(temp_directory=str(path / ".pack_spill"))
    rows: dict[str, int] = {}
    try:
        connection.execute(f"ATTACH '{quoted(temporary)}' AS run (STORAGE_VERSION '{STORAGE_VERSION}')")
        connection.execute("USE run")
        for table, meaning in TABLES.items():
            source = store.source(table)
            order = ", ".join(packed_order(meaning.order) if meaning.sampled else meaning.order)
            connection.execute(f"CREATE TABLE {table} AS SELECT * FROM {source} ORDER BY {order}")
            rows[table] = _count(connection, table)
            if rows[table] != _count(connection, source):
                raise MoevizError(f"{table} changed while it was packed; is the run still being written?")
        connection.execute(f"CREATE TABLE vocab AS SELECT * FROM {store.vocab()} ORDER BY token_id")
        connection.execute("CREATE TABLE run_info AS SELECT ?::VARCHAR AS info", [info.to_json().decode()])
        connection.execute(f"CREATE VIEW decisions AS {DECISIONS_SQL}")
        connection.execute("USE memory")
        connection.execute("DETACH run")
    except BaseException:
        connection.close()
        temporary.unlink(missing_ok=True)
        raise
    connection.close()
    _sync_file(temporary)
    return temporary, rows


def _write_segments(path: Path, info: RunInfo) -> None:
    connection = connect()
    try:
        connection.execute(f"ATTACH '{quoted(path / DATABASE_FILE)}' AS packed (READ_ONLY)")
        packed = packed_tables(connection)
        for table in TABLES:
            (path / table).mkdir(exist_ok=True)
            for name in segment_names(path / table):
                (path / table / name).unlink()
            source = f"packed.{table}" if table in packed else f"({empty_sql(table)})"
            _write_segment(connection, path, table, source, info)
    finally:
        connection.close()


def _write_segment(
    connection: duckdb.DuckDBPyConnection, path: Path, table: str, source: str, info: RunInfo
) -> None:
    attempt = info.attempts[-1]
    extent = connection.execute(f"SELECT min(step), max(step) FROM {source}").fetchone()
    first, last = extent if extent and extent[0] is not None else (attempt.from_step, attempt.from_step)
    if table == "load_lod":
        last = connection.execute("SELECT max(step + span - 1) FROM packed.load_lod").fetchone()[0] or last  # type: ignore[index]
    now_ms = int(time.time() * 1000)
    name = SegmentName(0, attempt.number, attempt.from_step, 0, 1, first, last, 2, now_ms)
    temporary = path / table / f".{name}.tmp"
    metadata = f"{{moeviz_schema: '{SCHEMA_VERSION}', moeviz_run: '{info.run_id}', moeviz_table: '{table}'}}"
    connection.execute(
        f"COPY (SELECT * FROM {source}) TO '{quoted(temporary)}' "
        f"(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 8192, KV_METADATA {metadata})"
    )
    _sync_file(temporary)
    os.rename(temporary, path / table / str(name))


def _count(connection: duckdb.DuckDBPyConnection, source: str) -> int:
    row = connection.execute(f"SELECT count(*) FROM {source}").fetchone()
    assert row is not None
    return int(row[0])


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path, segments: dict[str, list[str]]) -> int:
    """Delete packed segments and their folders. Returns their bytes."""
    freed = 0
    for table, names in segments.items():
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                freed += (path / table / name).stat().st_size
                (path / table / name).unlink()
        with contextlib.suppress(OSError):  # something else lies in it: leave it
            (path / table).rmdir()
    return freed


def main(argv: Sequence[str] | None = None) -> int:
    """What the training process calls, so that it need not import duckdb itself."""
    parser = argparse.ArgumentParser(prog="python -m moeviz.store.pack", description="Pack a finished run.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--unpack", action="store_true")
    parser.add_argument("--keep-segments", action="store_true")
    parser.add_argument("--force", action="store_true")
    options = parser.parse_args(argv)
    if options.unpack:
        unpack_run(options.run)
    else:
        pack_run(options.run, keep_segments=options.keep_segments, force=options.force)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
