"""Parquet that is written by hand: other people's readers say what is in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moeviz.store import pages, thrift
from moeviz.store.schema import TABLES, segment_schema
from moeviz.store.segments import write_parquet

SCHEMA = segment_schema("routing", "run-of-the-test")
STATISTICS = ("step", "layer", "seq")


def routing(rng: np.random.Generator, lengths: np.ndarray, num_experts: int) -> pa.Table:
    """Random rows; lists of `lengths` numbers."""
    rows = len(lengths)
    columns: dict[str, Any] = {
        "step": rng.integers(-5, 2**31, rows),
        "rank": rng.integers(0, 2**16, rows),
        "layer": rng.integers(0, 2**16, rows),
        "seq": rng.integers(0, 2**32, rows),
        "n_tokens": lengths,
        "k": rng.integers(0, 256, rows),
        "experts": [rng.integers(0, num_experts, length) for length in lengths],
        "weights": [rng.integers(0, 256, length) for length in lengths],
        "weight_scale": rng.random(rows),
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


def written(path: Path, table: pa.Table, row_groups: list[int]) -> Path:
    with open(path, "wb") as file:
        pages.write(file, table, row_groups, STATISTICS)
    return path


@pytest.mark.parametrize("num_experts", [1, 64, 256, 257, 2**16])
def test_other_readers_find_what_was_written(tmp_path: Path, num_experts: int) -> None:
    rng = np.random.default_rng(num_experts)
    table = routing(rng, np.array([1, 8, 7, 300, 1, 2048, 64]), num_experts)
    path = written(tmp_path / "rows.parquet", table, [3, 1, 3])
    assert pq.read_table(path).equals(table)
    assert duckdb.sql(f"FROM '{path}'").to_arrow_table().cast(SCHEMA).equals(table)
    one = duckdb.sql(f"SELECT experts[2] AS e FROM '{path}' WHERE step = {table['step'][3]}").fetchall()
    assert one == [(table["experts"][3][1].as_py(),)]


@pytest.mark.parametrize("seed", range(10))
def test_any_cut_into_row_groups_and_chunks_says_the_same(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [routing(rng, rng.integers(1, 50, rng.integers(1, 9)), 40) for _ in range(4)]
    table = pa.concat_tables(parts).slice(1)
    edges = np.unique(rng.integers(1, table.num_rows + 1, 3))
    row_groups = np.diff([0, *edges[edges < table.num_rows], table.num_rows]).tolist()
    path = written(tmp_path / "rows.parquet", table, row_groups)
    assert pq.read_table(path).equals(table)
    metadata = pq.read_metadata(path)
    assert [metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)] == row_groups


def test_statistics_are_those_of_each_row_group(tmp_path: Path) -> None:
    table = routing(np.random.default_rng(3), np.full(20, 4), 9)
    metadata = pq.read_metadata(written(tmp_path / "rows.parquet", table, [15, 5]))
    for group, rows in enumerate((table.slice(0, 15), table.slice(15))):
        for column, field in enumerate(SCHEMA):
            noted = metadata.row_group(group).column(column).statistics
            if field.name in STATISTICS:
                values = rows[field.name].to_pylist()
                assert (noted.min, noted.max, noted.null_count) == (min(values), max(values), 0)
            else:
                assert noted is None


def test_sizes_in_the_footer_are_those_of_the_file(tmp_path: Path) -> None:
    table = routing(np.random.default_rng(4), np.full(9, 100), 64)
    path = written(tmp_path / "rows.parquet", table, [9])
    group = pq.read_metadata(path).row_group(0)
    chunks = [group.column(at) for at in range(group.num_columns)]
    assert group.total_byte_size == sum(chunk.total_compressed_size for chunk in chunks)
    ends = 4
    for chunk in chunks:
        begins = chunk.dictionary_page_offset or chunk.data_page_offset
        assert begins == ends
        ends = begins + chunk.total_compressed_size


def test_the_file_says_which_run_and_schema_it_is_of(tmp_path: Path) -> None:
    table = routing(np.random.default_rng(5), np.full(2, 3), 4)
    ours = pq.read_schema(written(tmp_path / "rows.parquet", table, [2]))
    pq.write_table(table, tmp_path / "theirs.parquet")
    theirs = pq.read_schema(tmp_path / "theirs.parquet")
    assert ours.equals(theirs)
    assert {key: ours.metadata[key] for key in theirs.metadata} == theirs.metadata


def _without(change: Callable[[pa.Table], pa.Table]) -> pa.Table:
    return change(routing(np.random.default_rng(6), np.array([2, 3]), 4))


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.set_column(6, SCHEMA.field(6), pa.array([[1], None], SCHEMA.field(6).type)),
        lambda rows: rows.set_column(6, SCHEMA.field(6), pa.array([[1], []], SCHEMA.field(6).type)),
        lambda rows: rows.set_column(6, SCHEMA.field(6), pa.array([[1], [None]], SCHEMA.field(6).type)),
        lambda rows: rows.set_column(0, SCHEMA.field(0), pa.array([None, 1], pa.int32())),
        lambda rows: rows.append_column("name", pa.array(["a", "b"])),
        lambda rows: rows.select(["step", "rank"]),
    ],
    ids=["null list", "empty list", "null inside", "null number", "text", "no list"],
)
def test_what_does_not_fit_is_left_to_arrow(tmp_path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    table = _without(change)
    assert not pages.fits(table)
    write_parquet(tmp_path / "rows.parquet", table)
    assert pq.read_table(tmp_path / "rows.parquet").equals(table)


def attention(rng: np.random.Generator, sizes: list[tuple[int, int]]) -> pa.Table:
    """A random map a row."""
    schema = segment_schema("attention", "run-of-the-test")
    columns: dict[str, Any] = {
        name: rng.integers(0, 9, len(sizes)) for name in schema.names if name not in ("row_max", "map")
    }
    columns["row_max"] = [rng.random(rows, np.float32) for rows, _ in sizes]
    columns["map"] = [rng.integers(0, 256, rows * cols, np.uint8) for rows, cols in sizes]
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def test_lists_of_floats_are_found_to_the_bit(tmp_path: Path) -> None:
    table = attention(np.random.default_rng(9), [(128, 128), (1, 1), (7, 3), (128, 64)])
    table = pa.concat_tables([table, table.slice(1)])
    assert pages.fits(table)
    path = written(tmp_path / "rows.parquet", table, [3, 4])
    assert pq.read_table(path).equals(table)
    assert duckdb.sql(f"FROM '{path}'").to_arrow_table().cast(table.schema).equals(table)
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    column = table.schema.get_field_index("row_max")
    odd = table.slice(0, 1).set_column(
        column, table.schema.field(column), pa.array([special], table.schema.field(column).type)
    )
    back = pq.read_table(written(tmp_path / "odd.parquet", odd, [1]))["row_max"][0].values.to_numpy()
    assert back.tobytes() == special.tobytes()


def test_routing_fits_and_an_empty_segment_is_whole(tmp_path: Path) -> None:
    assert pages.fits(routing(np.random.default_rng(7), np.array([2, 3]), 4))
    for name in ("routing", "sequences"):
        empty = TABLES[name].schema.empty_table()
        write_parquet(tmp_path / f"{name}.parquet", empty)
        assert duckdb.sql(f"SELECT count(*) FROM '{tmp_path / name}.parquet'").fetchall() == [(0,)]
        assert pq.read_table(tmp_path / f"{name}.parquet").num_rows == 0


def test_a_row_group_stays_below_its_size_whatever_was_asked_for(tmp_path: Path) -> None:
    table = routing(np.random.default_rng(8), np.full(3000, 500), 64)
    write_parquet(tmp_path / "rows.parquet", table, row_groups=[2999, 1])
    metadata = pq.read_metadata(tmp_path / "rows.parquet")
    assert metadata.num_row_groups > 4
    assert pq.read_table(tmp_path / "rows.parquet").equals(table)


def test_integers_are_written_as_the_specification_says() -> None:
    assert [thrift.zigzag(value) for value in (0, -1, 1, -2, 2**31 - 1)] == [
        b"\x00",
        b"\x01",
        b"\x02",
        b"\x03",
        b"\xfe\xff\xff\xff\x0f",
    ]
    assert thrift.varint(300) == b"\xac\x02"
    assert thrift.fields_of([thrift.i32(1, 5), thrift.binary(3, b"ab")]) == b"\x15\x0a\x28\x02ab\x00"
    assert thrift.i32s(1, range(15))[2][:2] == b"\xf5\x0f", "lists of 15 and more tell their size apart"
