"""Samples (token rows, their texts, attention maps) and alerts -> rows, many records at once.

A record of these kinds is a few kB: making the columns of a batch costs more than filling them. So a writer keeps
such records for a while and encodes them together.

Gate weights and maps lose bits that are noise (see `quantise`).

Shapes: R rows, L layers, N sequences, S sequence, K experts per token, Q query rows and C key columns of a map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from moeviz.records import AlertRecord, AttentionRecord, SequenceRecord, TokenRoutingRecord
from moeviz.store.columns import Rows, lists, table_rows
from moeviz.store.quantise import weight_codes

SampleRecord = TokenRoutingRecord | SequenceRecord | AttentionRecord | AlertRecord

_ALERT_FIELDS = (
    *("episode", "rule", "rule_version", "layer", "experts", "severity", "raised_step", "cleared_step"),
    *("value", "peak", "threshold", "message", "remedy"),
)


def encode_samples(records: Sequence[SampleRecord]) -> Iterator[Rows]:
    """The rows of records, those of one table in one batch and in the order of their records."""
    kinds: dict[type, list[Any]] = {}
    for record in records:
        kinds.setdefault(type(record), []).append(record)
    for kind, same in kinds.items():
        if issubclass(kind, TokenRoutingRecord):
            yield from _routing(same)
        elif issubclass(kind, SequenceRecord):
            for _, alike in groupby(same, key=lambda record: record.token_loss_NS is None):
                yield from _sequences(list(alike))
        elif issubclass(kind, AttentionRecord):
            yield _attention(same)
        else:
            yield _alerts(same)


def held_bytes(record: SampleRecord) -> int:
    """Memory of the arrays that a record keeps until it is encoded."""
    if isinstance(record, AttentionRecord):
        return record.map_QC.nbytes
    if isinstance(record, TokenRoutingRecord):
        return record.experts_LNSK.nbytes + record.weights_LNSK.nbytes
    if isinstance(record, SequenceRecord):
        return 2 * record.token_ids_NS.nbytes
    return 1000


def json_text(value: Mapping[str, Any]) -> str:
    return orjson.dumps(
        value, default=str, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
    ).decode()


def _routing(records: Sequence[TokenRoutingRecord]) -> Iterator[Rows]:
    sizes = [len(record.layers) * len(record.seqs) for record in records]
    if not sum(sizes):
        return
    parts = [_routing_part(record) for record, size in zip(records, sizes, strict=True) if size]
    columns = {name: _joined([part[name] for part in parts]) for name in parts[0]}
    tokens_R = columns["n_tokens"].astype(np.int64)
    columns["k"] = np.repeat(np.array([record.experts_LNSK.shape[3] for record in records], np.uint8), sizes)
    offsets = _offsets(tokens_R * columns["k"])
    yield table_rows(
        "routing",
        {
            "step": _repeated([record.step for record in records], sizes, np.int32),
            "rank": _repeated([record.rank for record in records], sizes, np.uint16),
            **columns,
            "experts": lists(columns["experts"], offsets),
            "weights": lists(columns["weights"], offsets),
        },
        sum(sizes),
    )


def _routing_part(record: TokenRoutingRecord) -> dict[str, np.ndarray]:
    """Columns of one record, lists one after the other."""
    num_layers, num_seqs = record.experts_LNSK.shape[:2]
    lengths_N = np.asarray(record.lengths_N, dtype=np.int32)
    codes_LNSK, scale_LN = weight_codes(record.weights_LNSK)
    return {
        "layer": np.asarray(record.layers, dtype=np.uint16).repeat(num_seqs),
        "seq": np.tile(np.asarray(record.seqs, dtype=np.uint32), num_layers),
        "n_tokens": np.tile(lengths_N, num_layers),
        "experts": _valid(np.asarray(record.experts_LNSK, dtype=np.uint16), lengths_N),
        "weights": _valid(codes_LNSK, lengths_N),
        "weight_scale": scale_LN.reshape(-1),
    }


def _sequences(records: Sequence[SequenceRecord]) -> Iterator[Rows]:
    """Of records that all have losses, or none of them."""
    sizes = [len(record.seqs) for record in records]
    if not sum(sizes):
        return
    lengths = [np.asarray(record.lengths_N, dtype=np.int32) for record in records]
    tokens_R = np.concatenate(lengths)
    offsets = _offsets(tokens_R)

    def rows_of(arrays: Sequence[np.ndarray], dtype: type) -> pa.ListArray:
        own = [
            _valid(np.asarray(array_NS, dtype)[None], each)
            for array_NS, each in zip(arrays, lengths, strict=True)
        ]
        return lists(_joined(own), offsets)

    losses = [record.token_loss_NS for record in records if record.token_loss_NS is not None]
    domains = [domain for record in records for domain in record.domains]
    yield table_rows(
        "sequences",
        {
            "step": _repeated([record.step for record in records], sizes, np.int32),
            "rank": _repeated([record.rank for record in records], sizes, np.uint16),
            "seq": np.concatenate([np.asarray(record.seqs, dtype=np.uint32) for record in records]),
            "domain": pa.array(domains, pa.string()),
            "n_tokens": tokens_R,
            "token_ids": rows_of([record.token_ids_NS for record in records], np.int32),
            "token_loss": rows_of(losses, np.float32) if losses else None,
        },
        sum(sizes),
    )


def _attention(records: Sequence[AttentionRecord]) -> Rows:
    columns: dict[str, Any] = {
        name: np.array([getattr(record, name) for record in records], dtype)
        for name, dtype in (
            *(("step", np.int32), ("rank", np.uint16), ("layer", np.uint16), ("head", np.uint16)),
            *(("seq", np.uint32), ("q_len", np.int32), ("k_len", np.int32)),
        )
    }
    rows_R, cols_R = np.array([record.map_QC.shape for record in records], np.int32).T
    row_ends, code_ends = _offsets(rows_R), _offsets(rows_R.astype(np.int64) * cols_R)
    row_max, codes = np.empty(row_ends[-1], np.float32), np.empty(code_ends[-1], np.uint8)
    at = 0
    for num_cols, alike in groupby(records, key=lambda record: record.map_QC.shape[1]):
        maps = [record.map_QC for record in alike]
        rows = slice(row_ends[at], row_ends[at + len(maps)])
        own = slice(code_ends[at], code_ends[at + len(maps)])
        _map_codes(maps, row_max[rows], codes[own].reshape(rows.stop - rows.start, num_cols))
        at += len(maps)
    columns |= {"rows": rows_R, "cols": cols_R}
    columns |= {"row_max": lists(row_max, row_ends), "map": lists(codes, code_ends)}
    return table_rows("attention", columns, len(records))


def _map_codes(maps: Sequence[np.ndarray], row_max_R: np.ndarray, codes_RC: np.ndarray) -> None:
    """Fill in the largest value of each row of some maps, which is code 255, and the codes.

    What is not finite counts as 0. Every row is for itself: maps of equal rows are one table, and cost one pass.
    """
    map_RC = np.concatenate(maps, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(map_RC.sum())  # costs a tenth of looking at each
    if not finite:
        map_RC = np.nan_to_num(map_RC, copy=False, posinf=0.0, neginf=0.0)
    map_RC.max(axis=1, initial=0.0, out=row_max_R)
    map_RC *= (255 / np.where(row_max_R > 0, row_max_R, 1))[:, None]
    codes_RC[...] = np.rint(map_RC, out=map_RC)


def _alerts(records: Sequence[AlertRecord]) -> Rows:
    columns: dict[str, Any] = {name: [getattr(record, name) for record in records] for name in _ALERT_FIELDS}
    columns["step"] = [record.updated_step for record in records]
    columns["evidence"] = [json_text(record.evidence) for record in records]
    return table_rows("alerts", columns, len(records))


def _valid(array_LNS: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
    """[L, N, S, ...] -> the first `length` positions of each sequence, flat, one sequence after the other."""
    length = array_LNS.shape[2]
    if not (lengths_N == length).all():
        array_LNS = array_LNS[:, np.arange(length) < lengths_N[:, None]]
    return array_LNS.reshape(-1)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _repeated(values: Sequence[int], sizes: Sequence[int], dtype: type) -> np.ndarray:
    return np.repeat(np.array(values, dtype), sizes)


def _offsets(lengths_R: np.ndarray) -> np.ndarray:
    """Where lists of these lengths begin and end in their values."""
    offsets = np.zeros(len(lengths_R) + 1, np.int64)
    np.cumsum(lengths_R, out=offsets[1:])
    return offsets
