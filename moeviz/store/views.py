"""run.duckdb of a live run: views only, so that any DuckDB client can read a run while it is written.

    duckdb -readonly runs/mine/run.duckdb "select step, layer, counts from expert_load order by step desc
    limit 24"

The views apply `cover()` in SQL. The library does not use them: a list of names cut to the needed steps is
faster. A moved run opens after `SET VARIABLE moeviz_run = '/new/place'`.

Run as `python -m moeviz.store.views RUN`, so that a training process need not import duckdb.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from moeviz.store.engine import connect
from moeviz.store.run import DATABASE_FILE, VOCAB_FILE
from moeviz.store.schema import TABLES

STORAGE_VERSION = "v1.0.0"
"""A file of DuckDB 2 in its own format cannot be opened by 1.x."""

DECISIONS_SQL = """
SELECT step, rank, layer, seq, i // k AS pos, i % k AS slot, experts[i + 1] AS expert,
       (weights[i + 1] * weight_scale / 255)::FLOAT AS weight
FROM (SELECT step, rank, layer, seq, k, experts, weights, weight_scale, unnest(range(len(experts))) AS i FROM
routing)
"""
"""`decisions`: routing with a row per (token, layer, slot). Filters go below the unnest."""

_COVER_SQL = r"""
WITH names AS (
    SELECT file, regexp_extract(file,
        'r(\d+)-a(\d+)\.(-?\d+)-n(\d+)\.(\d+)-s-?\d+\.-?\d+-l(\d+)-(\d+)\.parquet$',
        ['r', 'a', 'start', 'n0', 'n1', 'l', 'ms']) AS f
    FROM glob({folder} || '/[!.]*.parquet')),
active AS (
    SELECT file, f.r::INT AS r, f.a::INT AS a, f.start::INT AS start, f.n0::INT AS n0, f.n1::INT AS n1,
           f.l::INT AS l, f.ms::BIGINT AS ms
    FROM names WHERE f.r <> '' AND (f.l = '0' OR f.ms::BIGINT <= epoch_ms(now()))),
covered AS (
    SELECT file, (SELECT min(start) FROM active later WHERE later.a > one.a) AS below FROM active one
    WHERE NOT EXISTS (FROM active other WHERE other.r = one.r AND other.a = one.a
        AND other.n0 <= one.n0 AND other.n1 >= one.n1
        AND (other.n1 - other.n0, other.l, -other.ms) > (one.n1 - one.n0, one.l, -one.ms)))
SELECT {columns} FROM read_parquet({folder} || '/[!.]*.parquet', filename = true,
        hive_partitioning = false) rows
JOIN covered ON rows.filename = covered.file
WHERE covered.below IS NULL OR rows.step < covered.below
"""


def view_sql(table: str, run_path: str) -> str:
    """SQL of the view `table` over the segments of the run at `run_path` (or at the variable moeviz_run)."""
    columns = ", ".join(f"rows.{column.name}" for column in TABLES[table].columns)
    return _COVER_SQL.format(folder=f"{_place(run_path)} || '/{table}'", columns=columns)


def write_database(run_path: str | Path) -> Path:
    """Write run.duckdb with a view per table and `decisions`, beside it first and then renamed."""
    run_path = Path(run_path).resolve()
    temporary = run_path / f".{DATABASE_FILE}.tmp"
    with suppress(FileNotFoundError):
        temporary.unlink()
    connection = connect(threads=1)
    try:
        connection.execute(f"ATTACH '{quoted(temporary)}' AS run (STORAGE_VERSION '{STORAGE_VERSION}')")
        connection.execute("USE run")
        for table in TABLES:
            connection.execute(f"CREATE VIEW {table} AS {view_sql(table, str(run_path))}")
        connection.execute(f"CREATE VIEW decisions AS {DECISIONS_SQL}")
        connection.execute(
            f"CREATE VIEW vocab AS FROM read_parquet({_place(str(run_path))} || '/{VOCAB_FILE}')"
        )
        connection.execute("USE memory")
        connection.execute("DETACH run")
    finally:
        connection.close()
    final = run_path / DATABASE_FILE
    os.replace(temporary, final)
    return final


def _place(run_path: str) -> str:
    return f"coalesce(getvariable('moeviz_run'), '{quoted(run_path)}')"


def quoted(path: str | Path) -> str:
    """A path inside an SQL string literal."""
    return str(path).replace("'", "''")


if __name__ == "__main__":
    write_database(sys.argv[1])
