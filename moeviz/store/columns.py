"""Columns and batches of rows in the types of a table's schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from moeviz.store.schema import TABLES

_SCHEMAS = {name: table.schema for name, table in TABLES.items()}


class Rows(NamedTuple):
    """Rows for one table."""

    table: str
    batch: pa.RecordBatch


def table_rows(table: str, columns: Mapping[str, Any], size: int) -> Rows:
    """Columns by name -> a batch in the order and types of the schema; None and missing columns are NULL."""
    schema = _SCHEMAS[table]
    arrays = []
    for field in schema:
        values = columns.get(field.name)
        if values is None:
            arrays.append(pa.nulls(size, field.type))
        elif isinstance(values, pa.Array):
            arrays.append(values if values.type == field.type else values.cast(field.type))
        else:
            arrays.append(pa.array(values, field.type))
    return Rows(table, pa.RecordBatch.from_arrays(arrays, schema=schema))


def constant(value: float, size: int, type_: pa.DataType) -> pa.Array:
    return pa.repeat(pa.scalar(value, type_), size)


def lists(values: np.ndarray, offsets: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def ragged(array_LE: np.ndarray | None, sizes_L: np.ndarray, dtype: type) -> pa.ListArray | None:
    """[L, E] -> one list per layer, cut to the layer's own number of experts."""
    if array_LE is None:
        return None
    array_LE = np.asarray(array_LE)
    offsets = np.concatenate(([0], np.cumsum(sizes_L)))
    own_LE = np.arange(array_LE.shape[1]) < sizes_L[:, None]
    values = array_LE.reshape(-1) if own_LE.all() else array_LE[own_LE]
    return lists(values.astype(dtype, copy=False), offsets)
