"""What a person's SQL may do: read the tables of the run, and nothing else.

Two walls. The connection itself has DuckDB's external access switched off but for the run's folder, and its
configuration locked. In front of it only single SELECT statements pass (and EXPLAIN of one), without
functions that
reach for files: the engine would refuse most of them too, but with a message that explains nothing.
"""

from __future__ import annotations

import re

import duckdb
import orjson

from moeviz.errors import MoevizError

_FILE_FUNCTION = re.compile(
    r"(read_\w+|parquet_\w+|sniff_csv|glob|query|query_table|sqlite_\w+|postgres_\w+|copy_\w+|iceberg_\w+|delta_\w+)"
)
_EXPLAIN = re.compile(r"\s*explain\s+(analyze\s+)?", re.IGNORECASE)


def check_select(connection: duckdb.DuckDBPyConnection, query: str) -> None:
    """Raise MoevizError unless `query` is one SELECT (or EXPLAIN of one) over the tables of the run."""
    try:
        statements = connection.extract_statements(query)
    except duckdb.Error as error:
        raise MoevizError(f"this is not SQL that DuckDB understands: {_first_lines(error)}") from error
    if len(statements) != 1:
        raise MoevizError(
            f"{len(statements)} statements given; give one SELECT (a PIVOT is one with IN (...))"
        )
    kind = statements[0].type.name
    if kind == "EXPLAIN":
        check_select(connection, _EXPLAIN.sub("", query, count=1))
        return
    if kind == "MULTI":
        raise MoevizError(
            "a PIVOT without IN (...) is two statements; list the values: PIVOT t ON c IN (1, 2)"
        )
    if kind != "SELECT":
        raise MoevizError(f"{kind} is refused: a run is read-only here; give one SELECT")
    for function in sorted(_functions(connection, query)):
        if _FILE_FUNCTION.fullmatch(function):
            raise MoevizError(
                f"{function}() is refused: queries read the tables of the run, not files; see SHOW TABLES"
            )


def explain_error(error: duckdb.Error, tables: str) -> MoevizError:
    """A DuckDB error on a person's SQL, as one they can act on."""
    if isinstance(error, duckdb.PermissionException):
        return MoevizError("access to files is refused: queries read the tables of the run; see SHOW TABLES")
    remedy = f"; the tables are {tables}" if isinstance(error, duckdb.CatalogException) else ""
    return MoevizError(f"{_first_lines(error)}{remedy}")


def _functions(connection: duckdb.DuckDBPyConnection, query: str) -> set[str]:
    row = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [query]).fetchone()
    assert row is not None
    found: set[str] = set()
    pending = [orjson.loads(row[0])]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            name = node.get("function_name")
            if isinstance(name, str):
                found.add(name.lower())
            pending.extend(node.values())
        elif isinstance(node, list):
            pending.extend(node)
    return found


def _first_lines(error: duckdb.Error) -> str:
    text = str(error).strip().split("\n\nLINE")[0]
    return " ".join(text.split())
