"""Parquet that is written by hand: other people's readers say what is in it."""

from __future__ import annotations

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
STATISTICS = ("step", "layer", "seq", "name")


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


def written(
    path: Path, table: pa.Table, row_groups: list[int], statistics: tuple[str, ...] = STATISTICS
) -> Path:
    plan = pages.fitting(table, statistics)
    assert plan is not None
    with open(path, "wb") as file:
        pages.write(file, table, plan, row_groups)
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


ODD_LIST = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), pa.array([4, 5], pa.uint16()))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[1], [None]], pa.list_(pa.uint16())),
        pa.ListArray.from_buffers(
            ODD_LIST.type, 2, [pa.py_buffer(b"\x01"), ODD_LIST.buffers()[1]], children=[ODD_LIST.values]
        ),
        pa.array([[1], [2]], pa.list_(pa.uint64())),
        pa.array([1, 2], pa.int64()),
        pa.array([True, False]),
    ],
    ids=["null inside", "numbers behind a null list", "long numbers in lists", "long numbers", "truths"],
)
def test_what_does_not_fit_is_left_to_arrow(tmp_path: Path, column: pa.Array) -> None:
    table = pa.table({"step": pa.array([1, 2], pa.int32()), "column": column})
    assert pages.fitting(table, STATISTICS) is None
    write_parquet(tmp_path / "rows.parquet", table)
    assert pq.read_table(tmp_path / "rows.parquet").equals(table)


def mixed(rng: np.random.Generator, rows: int, share: float) -> pa.Table:
    """Columns of every type that fits; `share` of their values is NULL, and of their lists as many are empty."""

    def some(values: list[Any], type_: pa.DataType) -> pa.Array:
        return pa.array([None if rng.random() < share else value for value in values], type_)

    def listed(most: int, element: pa.DataType) -> pa.Array:
        sizes = [0 if rng.random() < share else int(rng.integers(1, 30)) for _ in range(rows)]
        least = 1 - most if element == pa.int32() else 0
        return some([rng.integers(least, most, size).tolist() for size in sizes], pa.list_(element))

    words = ["", "é", "日本語", "\x00", "a" * 300, "name", "näme", *map(str, range(rng.integers(1, 600)))]
    columns = {
        "step": some(rng.integers(-9, 9, rows).tolist(), pa.int32()),
        "layer": some(rng.integers(0, 2**16, rows).tolist(), pa.uint16()),
        "seq": some(rng.integers(0, 2**32, rows).tolist(), pa.uint32()),
        "small": some(rng.integers(0, 256, rows).tolist(), pa.uint8()),
        "value": some([*rng.normal(size=rows - 2).tolist(), -np.inf, 1e300], pa.float64()),
        "short": some(rng.random(rows, np.float32).tolist(), pa.float32()),
        "name": some([words[at] for at in rng.integers(0, len(words), rows)], pa.string()),
        "same": some(["always"] * rows, pa.string()),
        "every": some([f"{at} is another" for at in range(rows)], pa.string()),
        "ids": listed(2**16, pa.uint16()),
        "codes": listed(256, pa.uint8()),
        "counts": listed(int(rng.choice([1, 200, 2000, 2**32])), pa.uint32()),
        "token_ids": listed(50_000, pa.int32()),
        "few_ids": listed(40, pa.int32()),
        "scores": listed(9, pa.float32()),
    }
    return pa.table(columns)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [3, 8, 700])
def test_text_and_nulls_are_found_by_other_readers(tmp_path: Path, rows: int, share: float) -> None:
    rng = np.random.default_rng(rows)
    table = mixed(rng, rows, share).replace_schema_metadata({"moeviz_run": "run-of-the-test"})
    path = written(tmp_path / "rows.parquet", table, [rows // 2, rows - rows // 2])
    found = pq.read_table(path)
    assert found.equals(table)
    assert found.schema.metadata[b"moeviz_run"] == b"run-of-the-test"
    assert duckdb.sql(f"FROM '{path}'").to_arrow_table().cast(table.schema).equals(table)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_filter_finds_its_rows_and_no_others(tmp_path: Path, share: float) -> None:
    """Readers skip row groups by what the statistics say."""
    table = mixed(np.random.default_rng(12), 300, share)
    path = written(tmp_path / "rows.parquet", table, [1, 99, 200])
    duckdb.register("rows_in_memory", table)
    for name, wanted in (("step", "3"), ("layer", "> 60000"), ("seq", "> 3000000000"), ("name", "'näme'")):
        test = f"{name} {wanted}" if wanted.startswith(">") else f"{name} = {wanted}"
        question = "SELECT count(*), max(value), min(every) FROM {} WHERE " + test
        in_file, in_memory = (
            duckdb.sql(question.format(source)).fetchall() for source in (f"'{path}'", "rows_in_memory")
        )
        assert in_file == in_memory
    nothing = duckdb.sql(f"SELECT count(*) FROM '{path}' WHERE name IS NULL").fetchall()
    assert nothing == [(table["name"].null_count,)]


def test_statistics_know_of_nulls_and_text(tmp_path: Path) -> None:
    columns = {
        "layer": pa.array([None, 4, 2, None, None], pa.uint16()),
        "name": pa.array(["b", "é", "", None, None]),
    }
    table = pa.table(columns)
    metadata = pq.read_metadata(written(tmp_path / "rows.parquet", table, [3, 2], ("layer", "name")))
    noted = [metadata.row_group(0).column(at).statistics for at in range(2)]
    assert [(each.min, each.max, each.null_count) for each in noted] == [(2, 4, 1), ("", "é", 0)]
    empty = [metadata.row_group(1).column(at).statistics for at in range(2)]
    assert [(each.has_min_max, each.null_count) for each in empty] == [(False, 2), (False, 2)]


@pytest.mark.parametrize(
    "distinct", [1, 2, 256, 257, 1000, 1500, 3000, 2**12 + 1, 2**13 + 1, 2**15, 2**15 + 1]
)
@pytest.mark.parametrize("odd", [0, 1, 5])
def test_counts_keep_their_values_at_any_width_of_codes(tmp_path: Path, distinct: int, odd: int) -> None:
    rng = np.random.default_rng(distinct)
    values = np.concatenate([np.arange(distinct), rng.integers(0, distinct, 2 * distinct + odd)]) + 2**31
    column = pa.ListArray.from_arrays(
        pa.array([0, 1, len(values)], pa.int32()), pa.array(values.astype(np.uint32))
    )
    table = pa.table({"counts": column})
    path = written(tmp_path / "rows.parquet", table, [2])
    assert pq.read_table(path).equals(table)
    assert duckdb.sql(f"FROM '{path}'").to_arrow_table().cast(table.schema).equals(table)


def test_a_dictionary_is_made_only_where_texts_return(tmp_path: Path) -> None:
    table = pa.table({"name": ["a", "b"] * 200, "detail": [str(at) for at in range(400)], "none": [""] * 400})
    path = written(tmp_path / "rows.parquet", table, [400])
    group = pq.read_metadata(path).row_group(0)
    assert [group.column(at).has_dictionary_page for at in range(3)] == [True, False, True]
    assert pq.read_table(path).equals(table)


def test_nan_and_its_bits_stay(tmp_path: Path) -> None:
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 5e-324])
    table = pa.table({"value": pa.array(special)})
    back = pq.read_table(written(tmp_path / "rows.parquet", table, [6]))["value"].to_numpy()
    assert back.tobytes() == special.tobytes()


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
    assert pages.fitting(routing(np.random.default_rng(7), np.array([2, 3]), 4), STATISTICS) is not None
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
