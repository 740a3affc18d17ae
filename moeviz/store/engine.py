"""One way to start DuckDB, on every version that is allowed: few threads, because training runs beside it."""

from __future__ import annotations

import duckdb

THREADS = 2


def connect(threads: int = THREADS, **settings: str) -> duckdb.DuckDBPyConnection:
    """An in-memory connection.

    Args:
        threads: for queries. DuckDB 2 starts eight more for reading files unless told otherwise; 1.5 has none.
        settings: further configuration, by DuckDB's names.
    """
    config: dict[str, str | bool | int | float | list[str]] = {"threads": threads, **settings}
    try:
        return duckdb.connect(config={**config, "async_threads": 1})
    except duckdb.InvalidInputException:  # DuckDB 1.5 does not know the setting
        return duckdb.connect(config=config)
