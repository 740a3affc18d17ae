"""Tiles: the same rows in another order, so that one step and one layer are both found in few row groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moeviz.store.cover import SegmentName
from moeviz.store.schema import TABLES, segment_schema
from moeviz.store.segments import write_segment
from moeviz.store.tiles import (
    SMALLEST_BYTES,
    TILE_BYTES,
    TILE_LAYERS,
    has_tiles,
    packed_order,
    tile_numbers,
    tiled,
)

ORDER = TABLES["routing"].order


def routing(steps: int, layers: int, seqs: int, tokens: int, seed: int = 0) -> pa.Table:
    """Rows of the table in any order; the first expert of a row is its number."""
    rng = np.random.default_rng(seed)
    keys = np.array([(t, at, s) for t in range(steps) for at in range(layers) for s in range(seqs)])
    keys = keys[rng.permutation(len(keys))]
    experts = rng.integers(0, 64, (len(keys), tokens))
    experts[:, 0] = np.arange(len(keys))
    columns = {
        "step": keys[:, 0],
        "rank": np.zeros(len(keys)),
        "layer": keys[:, 1],
        "seq": keys[:, 2],
        "n_tokens": np.full(len(keys), tokens),
        "k": np.ones(len(keys)),
        "experts": list(experts),
        "weights": list(experts % 256),
        "weight_scale": np.ones(len(keys)),
    }
    schema = segment_schema("routing", "x")
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (7, 5, 3, 11), (40, 24, 1, 700), (3, 24, 2, 4000)])
def test_every_row_is_there_once_and_tiles_end_where_row_groups_do(shape: tuple[int, int, int, int]) -> None:
    before = routing(*shape)
    after, row_groups = tiled(before, ORDER)
    assert sum(row_groups) == before.num_rows
    by_key = [(name, "ascending") for name in ORDER]
    assert after.sort_by(by_key).equals(before.sort_by(by_key))
    start = 0
    for size in row_groups:
        tile = after.slice(start, size)
        assert tile.equals(tile.sort_by(by_key))
        start += size


def test_a_step_and_a_layer_are_found_in_few_row_groups(tmp_path: Path) -> None:
    steps, layers = 90, 24
    rows, row_groups = tiled(routing(steps, layers, 1, 1500), ORDER)
    name = SegmentName(0, 0, 0, 1, 9, 0, steps - 1, 1, 0)
    metadata = pq.read_metadata(write_segment(tmp_path, name, rows, row_groups=row_groups))
    held = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
    ranges = {
        column: [(group.column(at).statistics.min, group.column(at).statistics.max) for group in held]
        for at, column in enumerate(("step", "rank", "layer"))
        if column != "rank"
    }

    def read(column: str, value: int) -> int:
        return sum(lo <= value <= hi for lo, hi in ranges[column])

    assert all(read("step", step) <= 2 * layers / TILE_LAYERS for step in range(steps))
    blocks = -(-rows.nbytes // (TILE_BYTES * layers // TILE_LAYERS))
    assert all(read("layer", layer) <= blocks + 1 for layer in range(layers))
    assert len(held) > 12, "the test means nothing unless there are many tiles"


def test_tiles_are_neither_tiny_nor_huge() -> None:
    rows, row_groups = tiled(routing(60, 24, 1, 1500), ORDER)
    row_bytes = rows.nbytes / rows.num_rows
    assert max(row_groups) * row_bytes < 1.5 * TILE_BYTES
    few, together = tiled(routing(2, 24, 1, 20), ORDER)
    assert few.nbytes < SMALLEST_BYTES
    assert together == [48]


def test_tables_that_are_asked_for_by_step_and_layer_have_tiles() -> None:
    assert {name for name, table in TABLES.items() if has_tiles(table.order)} >= {
        "routing",
        "expert_load",
        "attention",
    }
    assert not has_tiles(TABLES["scalars"].order)
    assert not has_tiles(TABLES["load_lod"].order)


def test_an_empty_table_has_no_tile() -> None:
    empty = segment_schema("routing", "x").empty_table()
    assert tiled(empty, ORDER).row_groups == []


@pytest.mark.parametrize("sort_by", [[], ["step"], ["step", "layer"], ["layer", "step"]])
def test_without_an_order_rows_keep_theirs_within_a_tile(sort_by: list[str]) -> None:
    before = routing(8, 24, 1, 900)
    if sort_by:
        before = before.sort_by([(name, "ascending") for name in sort_by])
    before = pa.concat_tables([before.slice(0, 50), before.slice(50)])
    after, row_groups = tiled(before)
    tiles = tile_numbers(before["layer"].to_numpy(), before["step"].to_numpy(), before.nbytes / 192)
    expected = [
        row for tile in np.unique(tiles) for row in before.filter(pa.array(tiles == tile)).to_pylist()
    ]
    assert after.to_pylist() == expected
    assert len(row_groups) > 1


def test_a_packed_file_keeps_a_step_together() -> None:
    assert packed_order(ORDER) == ("step", "layer", "seq")
    assert packed_order(TABLES["scalars"].order) == TABLES["scalars"].order
