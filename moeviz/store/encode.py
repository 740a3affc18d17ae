"""Records -> rows of the tables, as Arrow batches. Pure: no file, no clock, no queue.

Arrays are handed over without a copy wherever their layout allows (`ListArray.from_arrays` on the buffer of a
numpy array). What there is much of is encoded many records at once: see `encode_steps` and `encode_samples`.

Shapes: X pictures of latents, S rows and C columns of each, R singular values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import singledispatch
from typing import Any

import numpy as np
import pyarrow as pa

from moeviz.records import (
    AlertRecord,
    AnalysisRecord,
    AttentionRecord,
    EventRecord,
    LatentRecord,
    LoadRecord,
    MetricRecord,
    ProbeRecord,
    Record,
    ScalarRecord,
    SequenceRecord,
    TokenRoutingRecord,
)
from moeviz.store.columns import Rows, constant, lists, table_rows
from moeviz.store.encode_samples import SampleRecord, encode_samples, json_text
from moeviz.store.encode_steps import StepRecord, encode_steps


@singledispatch
def encode(record: Record, num_experts: Sequence[int] = ()) -> Iterator[Rows]:
    """The rows of one record.

    Args:
        record: any of `moeviz.records.Record`.
        num_experts: experts of each MoE layer; lists of loads are cut to it. Empty: keep all columns.

    Raises:
        TypeError: not a record.
    """
    raise TypeError(f"{type(record).__name__} is no record; a sink takes the classes of moeviz.records")


@encode.register(LoadRecord)
@encode.register(MetricRecord)
@encode.register(ScalarRecord)
def _(record: StepRecord, num_experts: Sequence[int] = ()) -> Iterator[Rows]:
    yield from encode_steps([record], num_experts)


@encode.register(TokenRoutingRecord)
@encode.register(SequenceRecord)
@encode.register(AttentionRecord)
@encode.register(AlertRecord)
def _(record: SampleRecord, num_experts: Sequence[int] = ()) -> Iterator[Rows]:
    yield from encode_samples([record])


@encode.register
def _(record: ProbeRecord, num_experts: Sequence[int] = ()) -> Iterator[Rows]:
    for rows in encode_samples([record.sequences, *record.routings]):
        yield rows._replace(table=f"probe_{rows.table}")


@encode.register
def _(record: LatentRecord, num_experts: Sequence[int] = ()) -> Iterator[Rows]:
    num, rows, cols = record.grid_XSC.shape
    if rows == 0:
        return
    grid_XSC = np.nan_to_num(np.asarray(record.grid_XSC, dtype=np.float32), posinf=0.0, neginf=0.0)
    lo_X, hi_X = grid_XSC.min(axis=(1, 2)), grid_XSC.max(axis=(1, 2))
    span_X = np.where(hi_X > lo_X, hi_X - lo_X, 1)
    codes = np.rint((grid_XSC - lo_X[:, None, None]) * (255 / span_X)[:, None, None]).astype(np.uint8)
    columns: dict[str, Any] = {
        name: [getattr(record, name)] * num
        for name in ("step", "rank", "layer", "name", "tokens", "seq", "first", "length")
    }
    columns |= {
        "head": list(record.heads) if record.heads else [None] * num,
        "rows": [rows] * num,
        "cols": [cols] * num,
        "singular": [row.tolist() for row in np.asarray(record.singular_XR, dtype=np.float32)],
        "profile": [row.tolist() for row in np.asarray(record.profile_XC, dtype=np.float32)],
        "lo": lo_X,
        "hi": hi_X,
        "grid": lists(codes.reshape(-1), np.arange(num + 1) * rows * cols),
    }
    yield table_rows("latents", columns, num)
    if record.rank == 0 and record.values:  # what other ranks saw differs by sampling alone
        values = list(record.values.values())
        yield table_rows(
            "metrics",
            {
                "step": [record.step] * len(values),
                "layer": [record.layer] * len(values),
                "name": list(record.values),
                "value": values,
            },
            len(values),
        )


@encode.register
def _(record: EventRecord, num_experts: Sequence[int] = ()) -> Iterator[Rows]:
    columns = {name: [getattr(record, name)] for name in ("step", "rank", "ts", "kind")}
    yield table_rows("events", {**columns, "detail": [json_text(record.detail)]}, 1)


@encode.register
def _(record: AnalysisRecord, num_experts: Sequence[int] = ()) -> Iterator[Rows]:
    values = record.values
    if not values:
        return
    columns: dict[str, Any] = {
        name: [getattr(each, name) for each in values] for name in ("part", "name", "label", "value")
    }
    columns["step"] = constant(record.step, len(values), pa.int32())
    columns["layer"] = [each.layer if each.layer >= 0 else None for each in values]
    columns["unit"] = [each.index if each.index >= 0 else None for each in values]
    for name in ("null_mean", "null_sd"):
        numbers = [getattr(each, name) for each in values]
        columns[name] = [None if number != number else number for number in numbers]
    yield table_rows("analysis", columns, len(values))
