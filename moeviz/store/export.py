"""A run's tables for other tools: Parquet or CSV files, or one DuckDB file.

What comes out is what readers see: rows of superseded attempts are gone, merged files count once. The folder is
built under a hidden name beside its place and renamed when it is whole, so a killed export leaves nothing that
looks finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import duckdb

from moeviz.errors import MoevizError
from moeviz.store.engine import connect
from moeviz.store.reader import Store
from moeviz.store.run import DATABASE_FILE
from moeviz.store.schema import TABLES
from moeviz.store.views import DECISIONS_SQL, STORAGE_VERSION, quoted

TableFormat = Literal["parquet", "csv", "duckdb"]

EXPORTABLE = (*TABLES, "vocab", "decisions")
"""What `--tables` may name. `decisions` is `routing` with a row per (token, layer, slot): large, so only when named."""

INFO_FILE = "run_info.json"
"""The run's run.json under another name: a folder of exported files is no run folder."""

_COPY_OPTIONS = {"parquet": "FORMAT parquet, COMPRESSION zstd", "csv": "FORMAT csv, HEADER"}


class Exported(NamedTuple):
    """What an export made."""

    folder: Path
    rows: dict[str, int]
    """By table."""
    bytes: int


def export_run(
    store: Store,
    folder: str | Path,
    table_format: TableFormat = "parquet",
    tables: Sequence[str] = (),
    progress: Callable[[str, int, int], None] = lambda table, done, total: None,
) -> Exported:
    """Write tables of a run into a new folder.

    Args:
        store: the run.
        folder: to make; must not exist.
        table_format: `parquet` and `csv`: a file a table (lists in CSV read `[1, 2]`), and run_info.json; `duckdb`: one
            run.duckdb with the tables and `run_info`, which `open_run` opens as well.
        tables: which of EXPORTABLE; empty: all but `decisions`.
        progress: called with a table, the rows that are written and the rows in all.

    Raises:
        MoevizError: the folder exists, or a table that a run does not have.
    """
    folder = Path(folder)
    chosen = _chosen(tables)
    if folder.exists() or folder.is_symlink():
        raise MoevizError(
            f"{folder} exists and is not overwritten; give another folder with --out, or delete it"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.exporting"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        connection = open_tables(store)
        try:
            rows = _write(connection, store, temporary, table_format, chosen, progress)
        finally:
            connection.close()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Exported(folder, rows, sum(file.stat().st_size for file in folder.iterdir()))


def open_tables(store: Store, empty: Sequence[str] = ()) -> duckdb.DuckDBPyConnection:
    """A connection with a view for each of EXPORTABLE, over the files that hold the run's rows now.

    Unlike that of a Store it may write files. Tables named in `empty` have no rows.
    """
    connection = connect()
    if store.info.packed:
        path = store.path if store.path.is_file() else store.path / DATABASE_FILE
        connection.execute(f"ATTACH '{quoted(path)}' AS packed (READ_ONLY)")
    for table in TABLES:
        store.segments(table)  # lists anew, so that no file is asked for that was merged away meanwhile
        where = "WHERE false" if table in empty else ""
        connection.execute(f"CREATE TEMP VIEW {table} AS SELECT * FROM {store.source(table)} {where}")
    connection.execute(f"CREATE TEMP VIEW vocab AS SELECT * FROM {store.vocab()}")
    connection.execute(f"CREATE TEMP VIEW decisions AS {DECISIONS_SQL}")
    return connection


def write_tables(
    connection: duckdb.DuckDBPyConnection,
    store: Store,
    path: Path,
    tables: Sequence[str],
    written: Callable[[str], None] = lambda table: None,
) -> None:
    """Copy views of `open_tables` into a new DuckDB file, with `run_info`, so that `open_run` opens it."""
    connection.execute(f"ATTACH '{quoted(path)}' AS made (STORAGE_VERSION '{STORAGE_VERSION}')")
    for table in tables:
        connection.execute(f"CREATE TABLE made.{table} AS {_rows_sql(table)}")
        written(table)
    if "vocab" not in tables:  # readers count on it
        connection.execute("CREATE TABLE made.vocab AS SELECT * FROM vocab LIMIT 0")
    info = replace(store.info, packed=True).to_json().decode()
    connection.execute("CREATE TABLE made.run_info AS SELECT ?::VARCHAR AS info", [info])
    if "routing" in tables and "decisions" not in tables:
        connection.execute("USE made")
        connection.execute(f"CREATE VIEW made.decisions AS {DECISIONS_SQL}")
        connection.execute("USE memory")
    connection.execute("DETACH made")


def _chosen(tables: Sequence[str]) -> list[str]:
    unknown = sorted({*tables} - {*EXPORTABLE})
    if unknown:
        raise MoevizError(f"no table {', '.join(unknown)}; a run has {', '.join(EXPORTABLE)}")
    return [table for table in EXPORTABLE if table in tables or (not tables and table != "decisions")]


def _write(
    connection: duckdb.DuckDBPyConnection,
    store: Store,
    folder: Path,
    table_format: TableFormat,
    tables: Sequence[str],
    progress: Callable[[str, int, int], None],
) -> dict[str, int]:
    rows = {table: _count(connection, table) for table in tables}
    total, done = sum(rows.values()), 0
    progress("", done, total)

    def written(table: str) -> None:
        nonlocal done
        done += rows[table]
        progress(table, done, total)

    if table_format == "duckdb":
        write_tables(connection, store, folder / DATABASE_FILE, tables, written)
        return rows
    for table in tables:
        file = quoted(folder / f"{table}.{table_format}")
        connection.execute(f"COPY ({_rows_sql(table)}) TO '{file}' ({_COPY_OPTIONS[table_format]})")
        written(table)
    (folder / INFO_FILE).write_bytes(store.info.to_json())
    return rows


def _rows_sql(table: str) -> str:
    order = {"vocab": ("token_id",), "decisions": ("step", "rank", "layer", "seq", "pos", "slot")}
    columns = TABLES[table].order if table in TABLES else order[table]
    return f"SELECT * FROM {table} ORDER BY {', '.join(columns)}"


def _count(connection: duckdb.DuckDBPyConnection, table: str) -> int:
    row = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    assert row is not None
    return int(row[0])
