"""A run in a DuckLake catalogue: sealed segments become files of a lake that other machines query.

    run/expert_load/r0-...parquet  --hard link-->  FILES/mine/expert_load/r0-...parquet  =  lake.mine.expert_load

A run is a schema of the lake, with the tables of `schema.TABLES` and the view `decisions`; `lake.main` has a table
`runs` and one view a table with the rows of all runs and a column `run`. Segments have no column for the run, and
are registered as they are: a schema a run needs no byte rewritten.

DuckLake owns what it is given: its clean-up deletes files. So it is given hard links (copies on another file
system): neither merging, packing nor deleting a run takes rows from the lake, nor the lake's clean-up from the run.
What is registered follows the run: files that were merged are replaced by the merged one, a packed run by its
tables, and rows of attempts that were superseded after a resume are deleted, all in one transaction.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import duckdb
import pyarrow.parquet as pq

from moeviz.errors import MoevizError
from moeviz.store.compact import run_lock
from moeviz.store.lake_catalog import LAKE, Catalog, Lake, open_lake, parse_catalog
from moeviz.store.listing import Listing, end_of_row, sql_type
from moeviz.store.run import DATABASE_FILE, VOCAB_FILE, RunInfo, read_info
from moeviz.store.schema import TABLES, VOCAB_SCHEMA
from moeviz.store.views import DECISIONS_SQL, quoted

LAKE_FOLDER = ".lake"
"""Beside the runs: where a new catalogue keeps its files unless told otherwise."""

_TRIES = 5
_RESERVED = ("main", "information_schema", "pg_catalog")
_RUNS_SQL = (
    f"CREATE TABLE IF NOT EXISTS {LAKE}.main.runs "
    "(run VARCHAR, run_id VARCHAR, path VARCHAR, created DOUBLE, registered DOUBLE, info VARCHAR)"
)

Progress = Callable[[int, int], None]
"""Called with the files that are registered and the files in all."""


class _Wanted(NamedTuple):
    """A file that the lake shall have."""

    source: Path | str
    """The file, or SQL whose rows go into a new one (of a packed run)."""
    below_step: int | None = None
    """Rows from this step on are superseded."""


class Registered(NamedTuple):
    """What one call did."""

    schema: str
    """The run in the lake."""
    added: int
    """Files."""
    removed: int
    """Files that the lake gave up because others took their place."""
    rows: int
    """Rows of the added files."""
    copied: int
    """Of `added`, files that could not be linked or had to be written."""
    files: Path
    """Folder of the lake's files."""
    label: str
    """The catalogue, without a password."""


def register_run(
    path: str | Path,
    catalog_url: str,
    *,
    name: str | None = None,
    files: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Registered:
    """Bring a lake up to date with what a run holds now.

    Args:
        path: run folder, of a live, ended or packed run.
        catalog_url: see `lake_catalog.parse_catalog`.
        name: schema of the run; None: its name. A run that is registered keeps the one it has.
        files: see `lake_catalog.open_lake`.
        progress: called for each file.

    Raises:
        MoevizError: no extension, no catalogue, another run of that name, or others keep writing the catalogue.
    """
    path = Path(path).absolute()
    catalog = parse_catalog(catalog_url)
    read_info(path)  # a run at all, before anything is made
    try:
        with _only_writer(catalog), run_lock(path, wait_seconds=60.0) as held:
            if not held:
                raise MoevizError(f"another process is merging or packing {path}; try again when it is done")
            info = read_info(path)  # again: it may have been packed while this waited
            lake = open_lake(catalog, files, path.parent / LAKE_FOLDER)
            with contextlib.closing(lake.connection):
                return _retrying(lambda: _Registration(lake, path, info, name).carry_out(progress), lake)
    except PermissionError as error:
        raise MoevizError(
            f"{error.filename} cannot be written; registering needs a lock there, as {path} has one"
        ) from error


@contextlib.contextmanager
def _only_writer(catalog: Catalog) -> Iterator[None]:
    """Wait for the others that write a SQLite catalogue. POSIX only."""
    if catalog.lock_file is None:
        yield
        return
    import fcntl

    with open(catalog.lock_file, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        yield


def _retrying(work: Callable[[], Registered], lake: Lake) -> Registered:
    """Another process may commit first, and SQLite takes one writer at a time."""
    for turn in range(_TRIES):
        try:
            return work()
        except duckdb.Error as error:
            text = " ".join(lake.catalog.masked(str(error)).split())
            if not re.search(r"locked|conflict|concurren", text, re.IGNORECASE) or turn + 1 == _TRIES:
                raise MoevizError(
                    f"nothing was registered in {lake.catalog.label}: {text}; call again when no other process "
                    "writes it, and check that DuckLake accepts this catalogue"
                ) from None
            time.sleep(0.2 * 2**turn)
    raise AssertionError("unreachable")


class _Registration:
    """One transaction."""

    def __init__(self, lake: Lake, path: Path, info: RunInfo, name: str | None) -> None:
        self._lake, self._path, self._info = lake, path, info
        self._execute = lake.connection.execute
        self._made: list[Path] = []
        self._copied = self._rows = 0
        self._name = name

    def carry_out(self, progress: Progress) -> Registered:
        self._execute("BEGIN")
        try:
            self._execute(_RUNS_SQL)
            schema, is_new = self._schema()
            changed = self._tables(schema)
            wanted = self._wanted()
            added, removed = self._exchange(schema, wanted, progress)
            if is_new or changed:
                self._views(schema)
            if is_new or added or removed:
                # Two processes that register one run both touch its row: the later one is refused, and tries again.
                self._execute(
                    f"UPDATE {LAKE}.main.runs SET registered = ?, info = ? WHERE run_id = ?",
                    [time.time(), self._info.to_json().decode(), self._info.run_id],
                )
            self._execute("COMMIT")
        except BaseException:
            with contextlib.suppress(duckdb.Error):
                self._execute("ROLLBACK")
            for file in self._made:
                file.unlink(missing_ok=True)
            raise
        files, label = self._lake.files, self._lake.catalog.label
        return Registered(schema, added, removed, self._rows, self._copied, files, label)

    def _schema(self) -> tuple[str, bool]:
        """The schema of the run, and whether it is new."""
        found = self._execute(
            f"SELECT run FROM {LAKE}.main.runs WHERE run_id = ?", [self._info.run_id]
        ).fetchone()
        if found is not None:
            return str(found[0]), False
        schema = re.sub(r"\W+", "_", self._name or self._info.name, flags=re.ASCII).strip("_") or "run"
        taken = self._execute(
            "SELECT count(*) FROM duckdb_schemas() WHERE database_name = ? AND lower(schema_name) = lower(?)",
            [LAKE, schema],
        ).fetchone()
        if schema.lower() in _RESERVED or (taken and taken[0]):
            raise MoevizError(f"the lake has another {schema}; give this run another name with --name")
        self._execute(f'CREATE SCHEMA {LAKE}."{schema}"')
        self._execute(
            f"INSERT INTO {LAKE}.main.runs VALUES (?, ?, ?, ?, ?, ?)",
            [schema, self._info.run_id, str(self._path), self._info.created, 0.0, ""],
        )
        return schema, True

    def _tables(self, schema: str) -> bool:
        """Make tables, or columns that a newer moeviz writes. Returns whether there were any."""
        changed = False
        for table, columns in _columns().items():
            place = f'{LAKE}."{schema}".{table}'
            there = {
                row[0]
                for row in self._execute(
                    "SELECT column_name FROM duckdb_columns() WHERE database_name = ? AND schema_name = ? "
                    "AND table_name = ?",
                    [LAKE, schema, table],
                ).fetchall()
            }
            if not there:
                types = ", ".join(f"{column} {kind}" for column, kind in columns.items())
                self._execute(f"CREATE TABLE {place} ({types})")
            for column, kind in columns.items() if there else ():
                if column not in there:
                    self._execute(f"ALTER TABLE {place} ADD COLUMN {column} {kind}")
            changed |= not there.issuperset(columns)
        return changed

    def _wanted(self) -> dict[str, dict[str, _Wanted]]:
        """By table and name: the files that hold the run's rows now."""
        if self._info.packed:
            return self._packed()
        wanted: dict[str, dict[str, _Wanted]] = {}
        for table in TABLES:
            listing = Listing(self._path / table, table)
            listing.refresh()
            wanted[table] = {
                str(one.name): _Wanted(self._path / table / str(one.name), one.below_step)
                for one in listing.files
                if one.name.last_flush > 0
            }
        vocab = self._path / VOCAB_FILE
        if vocab.exists():
            wanted["vocab"] = {f"vocab-{_stamp(vocab)}.parquet": _Wanted(vocab)}
        return wanted

    def _packed(self) -> dict[str, dict[str, _Wanted]]:
        database = self._path / DATABASE_FILE
        name = f"packed-{_stamp(database)}.parquet"
        self._execute(f"ATTACH IF NOT EXISTS '{quoted(database)}' AS packed (READ_ONLY)")
        there = {row[0] for row in self._execute("SHOW TABLES FROM packed").fetchall()}
        wanted = {}
        for table in _columns():
            order = TABLES[table].order if table in TABLES else ("token_id",)
            if table in there:
                wanted[table] = {name: _Wanted(f"SELECT * FROM packed.{table} ORDER BY {', '.join(order)}")}
        return wanted

    def _exchange(
        self, schema: str, wanted: dict[str, dict[str, _Wanted]], progress: Progress
    ) -> tuple[int, int]:
        added = removed = done = 0
        total = sum(len(files) for files in wanted.values())
        for table in _columns():
            files = wanted.get(table, {})
            listed = self._execute(
                f"SELECT data_file FROM ducklake_list_files('{LAKE}', '{table}', schema => '{schema}')"
            ).fetchall()
            registered = {os.path.basename(file): file for (file,) in listed}
            gone = [file for name, file in registered.items() if name not in files]
            if gone:
                names = ", ".join(f"'{quoted(file)}'" for file in gone)
                self._execute(f'DELETE FROM {LAKE}."{schema}".{table} WHERE filename IN ({names})')
                removed += len(gone)
            new = []
            for name, one in files.items():
                if name not in registered and (file := self._placed(schema, table, name, one)) is not None:
                    registered[name] = str(file)
                    new.append(f"'{quoted(file)}'")
                done += 1
                progress(done, total)
            if new:
                self._execute(
                    f"CALL ducklake_add_data_files('{LAKE}', '{table}', [{', '.join(new)}], schema => '{schema}', "
                    "allow_missing => true, hive_partitioning => false)"
                )
                added += len(new)
            self._cut(schema, table, files, registered)
        return added, removed

    def _placed(self, schema: str, table: str, name: str, wanted: _Wanted) -> Path | None:
        """Put a file where the lake's files are; None for one without rows, which DuckLake would not list."""
        source, target = wanted.source, self._lake.files / schema / table / name
        rows = self._count(source)
        if rows == 0:
            return None
        self._rows += rows
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            self._copied += self._place(source, target)
            self._made.append(target)
        return target

    def _count(self, source: Path | str) -> int:
        if isinstance(source, Path):
            return int(pq.read_metadata(source).num_rows)
        row = self._execute(f"SELECT count(*) FROM ({source})").fetchone()
        assert row is not None
        return int(row[0])

    def _place(self, source: Path | str, target: Path) -> bool:
        """Link, copy or write a file. Returns whether it takes space of its own."""
        if isinstance(source, Path):
            with contextlib.suppress(OSError):  # another file system, or one without links
                os.link(source, target)
                return False
        temporary = target.with_name(f".{target.name}.tmp")
        if isinstance(source, Path):
            shutil.copyfile(source, temporary)
        else:
            options = "FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 8192"
            self._execute(f"COPY ({source}) TO '{quoted(temporary)}' ({options})")
        os.replace(temporary, target)
        return True

    def _cut(self, schema: str, table: str, files: dict[str, _Wanted], registered: dict[str, str]) -> None:
        """Delete rows that a later attempt superseded; nothing happens where they are deleted already."""
        for name, one in files.items():
            if one.below_step is not None and name in registered:
                self._execute(
                    f'DELETE FROM {LAKE}."{schema}".{table} WHERE filename = ? AND {end_of_row(table)} >= ?',
                    [registered[name], one.below_step],
                )

    def _views(self, schema: str) -> None:
        self._execute(f'CREATE OR REPLACE VIEW {LAKE}."{schema}".decisions AS {DECISIONS_SQL}')
        runs = self._execute(f"SELECT run FROM {LAKE}.main.runs ORDER BY created, run").fetchall()
        for table in (*_columns(), "decisions"):
            # Without the name of the catalogue: other machines may attach it under any other.
            rows = " UNION ALL BY NAME ".join(
                f"SELECT '{run}' AS run, * FROM \"{run}\".{table}" for (run,) in runs
            )
            self._execute(f"CREATE OR REPLACE VIEW {LAKE}.main.{table} AS {rows}")


def _columns() -> dict[str, dict[str, str]]:
    """Tables of a run in the lake: column -> type of DuckDB."""
    schemas = {name: table.schema for name, table in TABLES.items()} | {"vocab": VOCAB_SCHEMA}
    return {
        name: {field.name: sql_type(str(field.type)) for field in schema} for name, schema in schemas.items()
    }


def _stamp(file: Path) -> str:
    """Tells one content of a file that is replaced whole from the next."""
    stat = file.stat()
    return f"{stat.st_mtime_ns}-{stat.st_size}"
