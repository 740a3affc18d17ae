"""Opening a DuckLake catalogue: the extensions it needs, its address, and the folder where it keeps its files.

DuckLake (https://ducklake.select) keeps what a lake holds in a database, here Postgres or SQLite, and the rows in
Parquet files. Its DuckDB extension is built for one DuckDB version each. The extra `lake` pins that version and
brings the extensions as packages, so that no download is needed; elsewhere DuckDB is asked to fetch them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import duckdb

from moeviz.errors import MoevizError
from moeviz.store.engine import connect
from moeviz.store.views import quoted

LAKE = "lake"
"""Name of the catalogue in the connection that `open_lake` gives."""

_SQLITE_SUFFIXES = (".sqlite", ".sqlite3", ".db")


class Catalog(NamedTuple):
    """Where a lake's catalogue is."""

    target: str
    """As DuckLake's ATTACH takes it, without `ducklake:`."""
    label: str
    """The same for people: without a password."""
    extension: str
    """The DuckDB extension that reads this database."""
    secret: str = ""
    """What must not be printed."""
    lock_file: Path | None = None
    """SQLite takes one writer at a time, and refuses others at once: who writes holds this file."""

    def masked(self, text: str) -> str:
        """`text` without the password."""
        return text.replace(self.target, self.label).replace(self.secret or "\0", "***")


def parse_catalog(url: str) -> Catalog:
    """Take a catalogue's address apart.

    Args:
        url: `postgresql://USER@HOST:PORT/DATABASE`, `postgres:KEY=VALUE ...` (libpq), `sqlite:FILE`, or a file named
            *.sqlite, *.sqlite3 or *.db.

    Raises:
        MoevizError: none of these, or a SQLite file in a folder that does not exist.
    """
    if url.startswith(("postgres://", "postgresql://")):
        password = urlsplit(url).password or ""
        label = url.replace(f":{password}@", ":***@") if password else url
        return Catalog(f"postgres:{url}", f"postgres:{label}", "postgres_scanner", password)
    if url.startswith("postgres:"):
        words = [word.partition("=") for word in url.removeprefix("postgres:").split()]
        password = next((value for key, _, value in words if key == "password"), "")
        label = url.replace(f"password={password}", "password=***") if password else url
        return Catalog(url, label, "postgres_scanner", password)
    file = Path(url.removeprefix("sqlite://").removeprefix("sqlite:")).expanduser()
    if url.startswith("sqlite:") or file.suffix in _SQLITE_SUFFIXES:
        if not file.absolute().parent.is_dir():
            raise MoevizError(f"{file} lies in a folder that does not exist; make {file.absolute().parent}")
        target = f"sqlite:{file.absolute()}"
        lock = file.absolute().with_name(f".{file.name}.lock")
        return Catalog(target, target, "sqlite_scanner", lock_file=lock)
    raise MoevizError(
        f"{url!r} is no catalogue; give postgresql://USER@HOST/DATABASE, postgres:host=... dbname=..., "
        "or sqlite:FILE"
    )


class Lake(NamedTuple):
    """An attached catalogue."""

    connection: duckdb.DuckDBPyConnection
    catalog: Catalog
    files: Path
    """Where its files are, seen from this machine."""


def open_lake(catalog: Catalog, files: Path | None, fallback: Path) -> Lake:
    """Attach a catalogue as `lake`, or make it.

    Args:
        catalog: where.
        files: folder of its files. For a new catalogue None means `fallback`; for an existing one it says where this
            machine sees the folder, and None means where it was made.
        fallback: folder for a new catalogue.

    Raises:
        MoevizError: an extension is missing, the database cannot be reached, or the folder does not exist.
    """
    connection = connect()
    try:
        for extension in (catalog.extension, "ducklake"):
            load_extension(connection, extension)
        if files is not None and "://" in str(files):
            raise MoevizError(f"{files} is no folder; give one that every reader can mount")
        folder = _attach_existing(connection, catalog, files)
        if folder is None:
            folder = (files or fallback).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            _attach(connection, catalog, f"DATA_PATH '{quoted(folder)}/', DATA_INLINING_ROW_LIMIT 0")
        return Lake(connection, catalog, folder)
    except BaseException:
        connection.close()
        raise


def load_extension(connection: duckdb.DuckDBPyConnection, name: str) -> None:
    """Load an extension from its Python package, or let DuckDB find or fetch it.

    Raises:
        MoevizError: neither works.
    """
    file = packaged_extension(name)
    try:
        if file is not None:
            connection.execute(f"LOAD '{quoted(file)}'")
        else:
            connection.execute(f"INSTALL {name}")  # nothing to do when it was fetched before
            connection.execute(f"LOAD {name}")
    except duckdb.Error as error:
        raise MoevizError(
            f"DuckDB {duckdb.__version__} found no extension {name} and could not fetch it "
            f'({str(error).splitlines()[0]}); run: pip install "moeviz[lake]", which brings the extensions and '
            "the DuckDB version that they are built for"
        ) from error


def packaged_extension(name: str) -> Path | None:
    """The file of an extension in its Python package, if there is one for this version of DuckDB."""
    spec = importlib.util.find_spec(f"duckdb_extension_{name}")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder) / "extensions" / f"v{duckdb.__version__}" / f"{name}.duckdb_extension"
        if file.exists():
            return file
    return None


def _attach_existing(
    connection: duckdb.DuckDBPyConnection, catalog: Catalog, files: Path | None
) -> Path | None:
    """Attach a catalogue that exists and return the folder of its files; None when there is none yet."""
    options = "CREATE_IF_NOT_EXISTS false, DATA_INLINING_ROW_LIMIT 0"
    if files is not None:
        options += f", DATA_PATH '{quoted(files.absolute())}/', OVERRIDE_DATA_PATH true"
    try:
        _attach(connection, catalog, options)
    except _NoCatalogError:
        return None
    row = connection.execute(
        f"SELECT value FROM ducklake_options('{LAKE}') WHERE option_name = 'data_path'"
    ).fetchone()
    assert row is not None
    folder = files.absolute() if files is not None else Path(row[0])
    if not folder.is_dir():
        raise MoevizError(
            f"the files of {catalog.label} are in {folder}, which this machine does not see; mount it, or give "
            "--data-path with the folder where it is mounted"
        )
    return folder


class _NoCatalogError(Exception):
    """The database is there, without a lake in it."""


def _attach(connection: duckdb.DuckDBPyConnection, catalog: Catalog, options: str) -> None:
    try:
        connection.execute(f"ATTACH 'ducklake:{quoted(catalog.target)}' AS {LAKE} ({options})")
    except duckdb.Error as error:
        if "creating a new DuckLake is explicitly disabled" in str(error):
            raise _NoCatalogError from error
        text = " ".join(catalog.masked(str(error)).split())
        raise MoevizError(
            f"{catalog.label} could not be opened: {text}; check the address, that the database runs, and that it is "
            "a catalogue of DuckLake"
        ) from None  # DuckDB's own text would tell the password
