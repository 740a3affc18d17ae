"""Records -> rows of the tables, as Arrow batches. Pure: no file, no clock, no queue.

Arrays are handed over without a copy wherever their layout allows (`ListArray.from_arrays` on the buffer of a
numpy array); gate weights and sums of scores lose bits that are noise (see `quantise`).

Shapes: L layers, E experts, N sequences, S sequence, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import singledispatch
from typing import Any

import numpy as np
import orjson
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
from moeviz.store.encode_steps import StepRecord, encode_steps
from moeviz.store.quantise import weight_codes


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


@encode.register
def _(record: TokenRoutingRecord, num_experts: Sequence[int] = ()) -> Iterator[Rows]:
    num_layers, num_seqs, _, k = record.experts_LNSK.shape
    if num_layers * num_seqs == 0:
        return
    lengths_N = np.asarray(record.lengths_N, dtype=np.int32)
    codes_LNSK, scale_LN = weight_codes(record.weights_LNSK)
    yield table_rows(
        "routing",
        {
            "step": constant(record.step, num_layers * num_seqs, pa.int32()),
            "rank": constant(record.rank, num_layers * num_seqs, pa.uint16()),
            "layer": np.repeat(np.asarray(record.layers, dtype=np.uint16), num_seqs),
            "seq": np.tile(np.asarray(record.seqs, dtype=np.uint32), num_layers),
            "n_tokens": np.tile(lengths_N, num_layers),
            "k": constant(k, num_layers * num_seqs, pa.uint8()),
            "experts": _sequences(record.experts_LNSK, lengths_N, np.uint16),
            "weights": _sequences(codes_LNSK, lengths_N, np.uint8),
            "weight_scale": scale_LN.reshape(-1),
        },
        num_layers * num_seqs,
    )


@encode.register
def _(record: SequenceRecord, num_experts: Sequence[int] = ()) -> Iterator[Rows]:
    num_seqs = len(record.seqs)
    if num_seqs == 0:
        return
    lengths_N = np.asarray(record.lengths_N, dtype=np.int32)
    loss_NS = record.token_loss_NS
    yield table_rows(
        "sequences",
        {
            "step": constant(record.step, num_seqs, pa.int32()),
            "rank": constant(record.rank, num_seqs, pa.uint16()),
            "seq": np.asarray(record.seqs, dtype=np.uint32),
            "domain": pa.array(record.domains, pa.string()),
            "n_tokens": lengths_N,
            "token_ids": _sequences(record.token_ids_NS[None], lengths_N, np.int32),
            "token_loss": None if loss_NS is None else _sequences(loss_NS[None], lengths_N, np.float32),
        },
        num_seqs,
    )


@encode.register
def _(record: ProbeRecord, num_experts: Sequence[int] = ()) -> Iterator[Rows]:
    parts: tuple[Record, ...] = (record.sequences, *record.routings)
    for part in parts:
        for rows in encode(part, num_experts):
            yield rows._replace(table=f"probe_{rows.table}")


@encode.register
def _(record: AttentionRecord, num_experts: Sequence[int] = ()) -> Iterator[Rows]:
    rows, cols = record.map_QC.shape
    map_QC = np.nan_to_num(np.asarray(record.map_QC, dtype=np.float32), posinf=0.0, neginf=0.0)
    row_max_Q = map_QC.max(axis=1, initial=0.0)
    codes_QC = np.rint(map_QC * (255 / np.where(row_max_Q > 0, row_max_Q, 1))[:, None]).astype(np.uint8)
    yield table_rows(
        "attention",
        {
            "step": [record.step],
            "rank": [record.rank],
            "layer": [record.layer],
            "head": [record.head],
            "seq": [record.seq],
            "q_len": [record.q_len],
            "k_len": [record.k_len],
            "rows": [rows],
            "cols": [cols],
            "row_max": lists(row_max_Q, np.array([0, rows])),
            "map": lists(codes_QC.reshape(-1), np.array([0, rows * cols])),
        },
        1,
    )


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
def _(record: AlertRecord, num_experts: Sequence[int] = ()) -> Iterator[Rows]:
    fields = (
        "episode rule rule_version layer experts severity raised_step cleared_step value peak threshold "
        "message remedy"
    )
    columns: dict[str, Any] = {name: [getattr(record, name)] for name in fields.split()}
    columns |= {"step": [record.updated_step], "evidence": [_json(record.evidence)]}
    yield table_rows("alerts", columns, 1)


@encode.register
def _(record: EventRecord, num_experts: Sequence[int] = ()) -> Iterator[Rows]:
    columns = {name: [getattr(record, name)] for name in ("step", "rank", "ts", "kind")}
    yield table_rows("events", {**columns, "detail": [_json(record.detail)]}, 1)


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


def _sequences(array_LNS: np.ndarray, lengths_N: np.ndarray, dtype: type) -> pa.ListArray:
    """[L, N, S, ...] -> one list per (layer, sequence) with its first `length` positions, flattened."""
    num_layers, _, length = array_LNS.shape[:3]
    width = int(np.prod(array_LNS.shape[3:], dtype=np.int64))
    array_LNS = np.ascontiguousarray(array_LNS, dtype=dtype)
    if not (lengths_N == length).all():
        array_LNS = array_LNS[:, np.arange(length) < lengths_N[:, None]]
    offsets = np.concatenate(([0], np.cumsum(np.tile(lengths_N.astype(np.int64) * width, num_layers))))
    return lists(array_LNS.reshape(-1), offsets)


def _json(value: Mapping[str, Any]) -> str:
    return orjson.dumps(
        value, default=str, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
    ).decode()
