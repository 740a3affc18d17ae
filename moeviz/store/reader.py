"""Reading a run: `open_run(path)` gives a `Store`, which answers SQL over what the folder holds right now.

Works while another process writes, after packing, and on a copied, moved or half-copied folder: what is
missing or damaged is skipped and named in `Store.notes`. Needs no torch, takes no lock, writes nothing but the time
of the file that tells a writer that somebody reads.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import duckdb
import pandas as pd
import pyarrow as pa

from moeviz.errors import MoevizError
from moeviz.store.catalog import locate_run
from moeviz.store.engine import connect
from moeviz.store.listing import Listing, empty_sql
from moeviz.store.load_memory import LayerCounts, LoadMemory
from moeviz.store.presence import Attention
from moeviz.store.run import DATABASE_FILE, RUN_FILE, VOCAB_FILE, RunInfo, read_info
from moeviz.store.sandbox import check_select, explain_error
from moeviz.store.schema import TABLES, VOCAB_SCHEMA
from moeviz.store.views import DECISIONS_SQL, quoted

_T = TypeVar("_T")

_QUERY_ERRORS = (
    duckdb.ParserException,
    duckdb.BinderException,
    duckdb.CatalogException,
    duckdb.DataError,
    duckdb.PermissionException,
    duckdb.OutOfMemoryException,
    duckdb.InterruptException,
)
"""Errors of the SQL itself: listing the files again would not help."""

_MOST_FOOTERS = 4096
"""Files after which a connection is replaced: it keeps the footer of each that it read, 34 kB, until it closes."""


def open_run(path: str | Path) -> Store:
    """Open a run for reading.

    Args:
        path: a run folder, a folder that contains runs (the newest is opened), or a run.duckdb.

    Raises:
        RunNotFoundError: no run there; the message names runs nearby.
        CorruptRunError: run.json is unreadable, or of a newer schema.
    """
    return Store(locate_run(path))


class Store:
    """One run, open for reading. Methods may be called from any thread; they take turns."""

    def __init__(self, path: Path) -> None:
        """Open the run folder `path`, or a packed file. `open_run` finds it first."""
        self.path = path.absolute()
        self._lock = threading.RLock()
        self._closed = False
        self._info_stamp: object = None
        self._listings: dict[str, Listing] = {}
        self._attention = Attention(self.path)
        self._connection: duckdb.DuckDBPyConnection | None = None
        self.info: RunInfo
        self._refresh()

    # What people use.

    @property
    def notes(self) -> list[str]:
        """What is missing or damaged, one sentence each; empty for a whole run."""
        with self._lock:
            self._refresh()
            return [note for listing in self._listings.values() for note in listing.notes]

    def sql(
        self,
        query: str,
        params: Sequence[Any] | dict[str, Any] | None = None,
        *,
        max_rows: int | None = None,
        max_seconds: float | None = None,
    ) -> pd.DataFrame:
        """Ask anything: one SELECT over the tables of the run (`schema.TABLES`, `decisions`, `vocab`).

        Args:
            query: the SELECT, with ? or $name where values go.
            params: the values.
            max_rows: fetch no more than these; None: all.
            max_seconds: give up after these; None: never.

        Raises:
            MoevizError: not a single SELECT, a function that reaches for files, SQL that DuckDB refuses, or a
                query that took too long.
        """
        with self._lock:
            self._refresh()
            assert self._connection is not None
            check_select(self._connection, query)
            self._create_views()
            alarm = threading.Timer(max_seconds or 0, self._connection.interrupt)
            if max_seconds is not None:
                alarm.start()
            try:
                return self._retrying(lambda: _fetch(self._run(query, params), max_rows))
            except duckdb.InterruptException as error:
                raise MoevizError(
                    f"the query took more than {max_seconds:g} s; ask for fewer steps"
                ) from error
            except duckdb.Error as error:
                raise explain_error(error, ", ".join([*TABLES, "decisions", "vocab"])) from error
            finally:
                alarm.cancel()

    def close(self) -> None:
        """Release the connection. Closing twice is allowed."""
        with self._lock:
            self._closed = True
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What moeviz.store.queries uses.

    def frame(
        self, build: Callable[[], str], params: Sequence[Any] | dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Run trusted SQL. `build` makes it from `source(...)`, again after files were merged away."""
        with self._lock:
            self._refresh()
            return self._retrying(lambda: self._run(build(), params).df())

    def arrow(
        self, build: Callable[[], str], params: Sequence[Any] | dict[str, Any] | None = None
    ) -> pa.Table:
        """Like `frame`, as an Arrow table: list columns without a Python object per row."""
        with self._lock:
            self._refresh()
            return self._retrying(lambda: self._relation(build(), params).to_arrow_table())

    def source(self, table: str, first: int | None = None, last: int | None = None) -> str:
        """SQL that stands for `table` after FROM, reading only files with steps in first..last (inclusive).

        A file may hold other steps as well: the caller's WHERE decides.
        """
        if self.info.packed:
            return f"packed.{table}" if table in self._packed else f"({empty_sql(table)})"
        return self._listings[table].sql(first, last)

    def newest_step(self, table: str) -> int | None:
        """An upper bound on the steps in `table`, close to the newest; None when empty. Reads no rows."""
        with self._lock:
            self._refresh()
            if self.info.packed:
                return self._run(f"SELECT max(step) FROM {self.source(table)}", None).fetchone()[0]  # type: ignore[index]
            known = self._listings[table].step_range()
            return None if known is None else known[1]

    def announced_steps(self, table: str) -> tuple[int, int] | None:
        """First and last step of `table` by the names of its files, without reading one.

        None where names do not tell: packed, empty, or a resumed run of which some rows are superseded.
        """
        with self._lock:
            self._refresh()
            listing = None if self.info.packed else self._listings[table]
            return None if listing is None or listing.cut else listing.step_range()

    def layer_counts(self, layer: int) -> LayerCounts:
        """Counts of every step of one layer; rows that were read before are not read again. Not for packed runs."""
        with self._lock:
            self._refresh()
            listing = self._listings["expert_load"]

            def ask() -> pa.Table:
                new = listing.sql_of(self._memory.unread(layer, listing.files))
                return self._relation(
                    f"SELECT step, counts FROM {new} WHERE layer = {layer}", None
                ).to_arrow_table()

            num_experts = self.info.model.layers[layer].num_experts
            return self._memory.extend(layer, num_experts, listing.files, self._retrying(ask))

    def segments(self, table: str) -> list[str]:
        """File names of `table` that can be read, with those that a merged one covers; none when packed."""
        with self._lock:
            self._refresh(anew=True)
            return [] if self.info.packed else self._listings[table].readable

    def revisions(self) -> dict[str, int]:
        """A number for each table that changes whenever its files do."""
        with self._lock:
            self._refresh()
            return {table: -1 if self.info.packed else self._listings[table].revision for table in TABLES}

    # The machinery.

    def _run(self, query: str, params: Sequence[Any] | dict[str, Any] | None) -> duckdb.DuckDBPyConnection:
        assert self._connection is not None
        return self._connection.execute(query, params) if params else self._connection.execute(query)

    def _relation(self, query: str, params: Sequence[Any] | dict[str, Any] | None) -> duckdb.DuckDBPyRelation:
        assert self._connection is not None
        return self._connection.sql(query, params=params) if params else self._connection.sql(query)

    def _retrying(self, ask: Callable[[], _T]) -> _T:
        """Ask; after a file vanished (merged, packed away) list again; a damaged one is found and skipped."""
        for thorough in (False, True):
            try:
                return ask()
            except _QUERY_ERRORS:
                raise
            except duckdb.Error:
                self._refresh(anew=True, thorough=thorough)
                self._create_views()
        return ask()

    def _refresh(self, anew: bool = False, thorough: bool = False) -> None:
        if self._closed:
            raise MoevizError(f"the run {self.path} is closed; open it again with open_run")
        stamp = self._stamp()
        if stamp != self._info_stamp or self._connection is None:
            self._open()
            self._info_stamp = stamp
        if self._listings:
            self._attention.tell()
        for listing in self._listings.values():
            self._footers += listing.refresh(anew, thorough)
        if self._footers > _MOST_FOOTERS:
            self._connect()

    def _stamp(self) -> object:
        if self.path.is_file():
            return None
        try:
            stat = (self.path / RUN_FILE).stat()
        except FileNotFoundError:
            read_info(self.path)
            raise
        return (stat.st_mtime_ns, stat.st_ino)

    def _open(self) -> None:
        """(Re)connect: at the start, and when run.json changed (the run was packed, unpacked, resumed)."""
        self._connect()
        folder = self._folder
        self._listings = (
            {} if self.info.packed else {table: Listing(folder / table, table) for table in TABLES}
        )
        self._memory = LoadMemory()

    @property
    def _folder(self) -> Path:
        return self.path.parent if self.path.is_file() else self.path

    def _connect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        folder = self._folder
        self._connection = connection = connect()
        if self.path.is_file():
            self.info = _attach(connection, self.path)
        else:
            self.info = read_info(self.path)
            if self.info.packed:
                _attach(connection, self.path / DATABASE_FILE)
        self._packed = packed_tables(connection) if self.info.packed else frozenset()
        self._footers = 0
        self._viewed: dict[str, int] = {}
        self._vocab_view = ""
        with contextlib.suppress(duckdb.CatalogException):  # a setting of newer versions
            connection.execute("SET parquet_metadata_cache = true")
        connection.execute("SET python_enable_replacements = false")
        connection.execute("SET temp_directory = ''")
        connection.execute(f"SET allowed_directories = ['{quoted(folder.resolve())}', '{quoted(folder)}']")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")

    def _create_views(self) -> None:
        """Views for people's SQL: recreated where files came or went since they were made."""
        assert self._connection is not None
        execute = self._connection.execute
        for table in TABLES:
            revision = -1 if self.info.packed else self._listings[table].revision
            if self._viewed.get(table) != revision:
                execute(f"CREATE OR REPLACE TEMP VIEW {table} AS SELECT * FROM {self.source(table)}")
                self._viewed[table] = revision
        vocab = self.vocab()
        if self._vocab_view != vocab:
            execute(f"CREATE OR REPLACE TEMP VIEW decisions AS {DECISIONS_SQL}")
            execute(f"CREATE OR REPLACE TEMP VIEW vocab AS SELECT * FROM {vocab}")
            self._vocab_view = vocab

    def vocab(self) -> str:
        """SQL that stands for the vocabulary after FROM."""
        if self.info.packed:
            return "packed.vocab"
        path = self.path / VOCAB_FILE
        if path.exists():
            return f"read_parquet('{quoted(path)}')"
        names = ", ".join(f"NULL AS {name}" for name in VOCAB_SCHEMA.names)
        return f"(SELECT {names} WHERE false)"


def _fetch(answer: duckdb.DuckDBPyConnection, max_rows: int | None) -> pd.DataFrame:
    """The rows of an answer, or its first `max_rows` without making the others."""
    if max_rows is None:
        return answer.df()
    chunks = [answer.fetch_df_chunk()]
    rows = len(chunks[0])
    while rows < max_rows and len(chunks[-1]):
        chunks.append(answer.fetch_df_chunk())
        rows += len(chunks[-1])
    return pd.concat(chunks[:-1] if len(chunks) > 1 and not len(chunks[-1]) else chunks).head(max_rows)


def packed_tables(connection: duckdb.DuckDBPyConnection) -> frozenset[str]:
    """Tables in the attached file: one that was packed before a table existed lacks it."""
    rows = connection.execute("SELECT table_name FROM duckdb_tables() WHERE database_name = 'packed'")
    return frozenset(name for (name,) in rows.fetchall())


def _attach(connection: duckdb.DuckDBPyConnection, path: Path) -> RunInfo:
    """Attach a packed file as `packed` and read the RunInfo in it."""
    connection.execute(f"ATTACH '{quoted(path)}' AS packed (READ_ONLY)")
    row = None
    with contextlib.suppress(duckdb.CatalogException):
        row = connection.execute("SELECT info FROM packed.run_info").fetchone()
    if row is None:
        raise MoevizError(f"{path} holds views only; open its folder, or pack it there with `moeviz pack`")
    return RunInfo.from_json(row[0])
