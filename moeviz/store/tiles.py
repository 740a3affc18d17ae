"""In which order rows lie in a segment, and where its row groups end: what a question must read follows from it.

Half of the questions ask for one step through all layers, the other half for one layer over many steps. Sorted by
layer a file serves the second kind and ruins the first, sorted by step the other way round (a sequence of 49,152
decisions took 130 ms out of 1e7). So rows lie in tiles of a few layers by a few steps, one row group each: both
kinds read some tiles of 0.4 MB, and the statistics of the row groups say which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

TILE_BYTES = 400_000
"""Arrow bytes of a tile of a merged file."""
SMALLEST_BYTES = 100_000
"""Arrow bytes below which a fresh file is not divided further: a row group costs half a millisecond to write."""
TILE_LAYERS = 4
"""Layers of a tile, at the least."""


class Tiled(NamedTuple):
    """Rows in the order of their tiles."""

    rows: pa.Table
    row_groups: list[int]
    """Rows of each tile, in order."""


def tiled(rows: pa.Table, order: Sequence[str] = ()) -> Tiled:
    """Sort rows by tile, and by the columns `order` within each; without any, rows of a tile keep their order."""
    if rows.num_rows == 0:
        return Tiled(rows, [])
    if not order and rows.nbytes < 2 * SMALLEST_BYTES:  # less than two tiles, whatever is in it
        return Tiled(rows, [rows.num_rows])
    tile_R = tile_numbers(rows["layer"].to_numpy(), rows["step"].to_numpy(), rows.nbytes / rows.num_rows)
    if not order and not tile_R.any():  # a fresh file of few steps: one tile, in the order that it has
        return Tiled(rows, [rows.num_rows])
    if order:
        keys = pa.table([pa.array(tile_R), *rows.select(list(order)).columns], names=["tile", *order])
        at_R = pc.sort_indices(keys, sort_keys=[(name, "ascending") for name in keys.column_names]).to_numpy()
    else:
        at_R = np.argsort(tile_R, kind="stable")
    _, sizes = np.unique(tile_R, return_counts=True)
    return Tiled(_rearranged(rows, at_R.astype(np.int64)), sizes.tolist())


def _rearranged(rows: pa.Table, at_R: np.ndarray) -> pa.Table:
    """Rows in the order `at_R`. Long stretches that stay together, like the layers of a record, are not copied."""
    starts = np.flatnonzero(np.diff(at_R, prepend=at_R[0] - 2) != 1)
    if len(starts) > len(at_R) / 2:
        return rows.take(pa.array(at_R))
    lengths = np.diff(starts, append=len(at_R))
    stretches = zip(at_R[starts].tolist(), lengths.tolist(), strict=True)
    return pa.concat_tables(rows.slice(first, length) for first, length in stretches).combine_chunks()


def packed_order(order: tuple[str, ...]) -> tuple[str, ...]:
    """The order of rows in a table of a packed file, which skips what it need not decode by itself.

    By step where rows are long lists of decisions or codes: a sequence is then in one place (4 ms of 1e8 decisions
    instead of 64), and a layer over 100 steps still in two or three. Short rows stay by layer.
    """
    return ("step", "layer", *order[2:]) if has_tiles(order) else order


def has_tiles(order: tuple[str, ...]) -> bool:
    """Whether the rows of a table are asked for by layer and by step."""
    return order[:2] == ("layer", "step")


def tile_numbers(layer_R: np.ndarray, step_R: np.ndarray, row_bytes: float) -> np.ndarray:
    """Tile of each row, int [R]: blocks of steps one after the other, groups of layers within each.

    Args:
        layer_R, step_R: of the rows.
        row_bytes: Arrow bytes of a row, on average.
    """
    layers, layer_at_R = np.unique(layer_R, return_inverse=True)
    most = max(1, int(len(layer_R) * row_bytes / SMALLEST_BYTES))
    groups = min(-(-len(layers) // TILE_LAYERS), most)
    _, step_at_R, rows_of_step = np.unique(step_R, return_inverse=True, return_counts=True)
    before_T = np.cumsum(rows_of_step) - rows_of_step
    block_T = (before_T * row_bytes // (TILE_BYTES * groups)).astype(np.int64)
    return block_T[step_at_R] * groups + layer_at_R * groups // len(layers)
