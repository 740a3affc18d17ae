"""What a run recorded before the step at which it is resumed, as the records that were written then.

For a training process that goes on: alerts and statistics of the steps before are needed there, and it must not
import the query engine. So this reads the segments with pyarrow alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from moeviz.records import (
    AlertRecord,
    LoadRecord,
    ProbeRecord,
    ScalarRecord,
    SequenceRecord,
    TokenRoutingRecord,
)
from moeviz.store.cover import cover
from moeviz.store.run import read_info
from moeviz.store.schema import MEANS, TABLES
from moeviz.store.segments import read_segment, segment_names

_log = logging.getLogger("moeviz.store")
_LARGEST_STEP = (1 << 31) - 1
_PASSES = 8
"""Passes over the fixed probe that are read back."""


class Past(NamedTuple):
    """State of a run before a step."""

    records: list[LoadRecord | ScalarRecord | ProbeRecord]
    """Of the newest steps, and the newest passes over the fixed probe; oldest first."""
    open_alerts: list[AlertRecord]
    """Latest state of every alert that was open then, in the order in which they were raised."""


def read_past(path: str | Path, before_step: int, rank: int = 0, steps: int = 500) -> Past:
    """What the run in `path` recorded in the `steps` steps before `before_step`, and which alerts were open then.

    Call it after `resume_run`, which unpacks a packed run and says which rows are superseded. Damaged segments
    are skipped and named in the log.

    Raises:
        RunNotFoundError, CorruptRunError: no run, or none that can be read.
    """
    path = Path(path)
    num_experts = [layer.num_experts for layer in read_info(path).model.layers]
    first, last = before_step - steps, before_step - 1
    records: list[LoadRecord | ScalarRecord | ProbeRecord] = [
        *_scalars(_rows(path, "scalars", rank, first, last), rank)
    ]
    records += _loads(_rows(path, "expert_load", rank, first, last), rank, num_experts)
    records += _probes(path, rank, last)
    records.sort(key=lambda record: record.step)
    states = {alert.episode: alert for alert in _alerts(_rows(path, "alerts", rank, -1, last))}
    return Past(records, [alert for alert in states.values() if alert.cleared_step is None])


def _rows(path: Path, table: str, rank: int, first: int, last: int) -> pa.Table:
    """Live rows that `rank` wrote about steps first..last, in the order of their files."""
    folder, schema = path / table, TABLES[table].schema
    parts = [schema.empty_table()]
    own: list[tuple[str, str, int]] = [("rank", "=", rank)] if "rank" in schema.names else []
    for name, below_step in cover(segment_names(folder), time.time()):
        top = min(last, (below_step or _LARGEST_STEP) - 1)
        # A file of rank 0 holds the rows of all ranks after a packed run was unpacked.
        if name.rank not in (rank, 0) or name.last_step < first or name.first_step > top:
            continue
        try:
            part = read_segment(folder, name, filters=[*own, ("step", ">=", first), ("step", "<=", top)])
            parts.append(part.select(schema.names).cast(schema))
        except (OSError, KeyError, pa.ArrowException) as error:
            _log.warning("%s/%s could not be read (%s); its rows are left out", table, name, error)
    return pa.concat_tables(parts)


def _scalars(rows: pa.Table, rank: int) -> Iterator[ScalarRecord]:
    by_step: dict[int, dict[str, float]] = {}
    times: dict[int, float] = {}
    for row in rows.select(["step", "ts", "name", "value"]).to_pylist():
        by_step.setdefault(row["step"], {})[row["name"]] = row["value"]
        times[row["step"]] = row["ts"]
    for step, values in by_step.items():
        yield ScalarRecord(step=step, rank=rank, ts=times[step], values=values)


def _loads(rows: pa.Table, rank: int, num_experts: list[int]) -> Iterator[LoadRecord]:
    """One record for each step of which every layer is there."""
    shape = (len(num_experts), max(num_experts, default=0))
    layers, step_R = rows["layer"].to_numpy(), rows["step"].to_numpy()
    for step in np.unique(step_R):
        at = np.flatnonzero(step_R == step)
        at = at[np.argsort(layers[at], kind="stable")]
        if len(at) != len(num_experts):
            continue
        columns = rows.take(pa.array(at)).to_pydict()
        tables = {
            name: _padded(columns[column], shape, dtype)
            for name, column, dtype in (
                ("prob_sum_LE", "prob_sum", np.float32),
                ("weight_sum_LE", "weight_sum", np.float32),
                ("bias_LE", "bias", np.float32),
                ("dropped_LE", "dropped", np.int64),
            )
        }
        counts_LE = _padded(columns["counts"], shape, np.int64)
        assert counts_LE is not None, "counts are never NULL"
        tokens = columns["tokens"][0]
        yield LoadRecord(
            step=int(step),
            rank=rank,
            ts=columns["ts"][0],
            tokens=tokens,
            counts_LE=counts_LE,
            token_sums={
                name: np.array(columns[column], dtype=np.float32) * np.float32(tokens)
                for name, column in MEANS.items()
                if None not in columns[column]
            },
            **tables,
        )


def _probes(path: Path, rank: int, last: int) -> Iterator[ProbeRecord]:
    """The newest passes over the fixed probe: enough to judge the next one. Similarities are not kept in their rows."""
    sequences = _rows(path, "probe_sequences", rank, -1, last)
    steps = np.unique(sequences["step"].to_numpy())[-_PASSES:]
    if not len(steps):
        return
    routing = _rows(path, "probe_routing", rank, int(steps[0]), last)
    for step in steps.tolist():
        texts = sequences.filter(pc.field("step") == step).sort_by("seq").to_pydict()
        decisions = routing.filter(pc.field("step") == step).sort_by(
            [("layer", "ascending"), ("seq", "ascending")]
        )
        lengths_N = np.array(texts["n_tokens"], dtype=np.int32)
        ids_NS = np.zeros((len(lengths_N), int(lengths_N.max(initial=0))), dtype=np.int32)
        for n, ids in enumerate(texts["token_ids"]):
            ids_NS[n, : len(ids)] = ids
        seqs = np.array(texts["seq"], dtype=np.int64)
        routings = tuple(
            _routing(layer, decisions.filter(pc.field("layer") == layer).to_pydict(), step, seqs, lengths_N)
            for layer in np.unique(decisions["layer"].to_numpy()).tolist()
        )
        text = SequenceRecord(
            step=step,
            rank=rank,
            seqs=seqs,
            token_ids_NS=ids_NS,
            lengths_N=lengths_N,
            domains=tuple(texts["domain"]),
        )
        yield ProbeRecord(step=step, rank=rank, sequences=text, routings=routings)


def _routing(
    layer: int, rows: dict[str, list], step: int, seqs: np.ndarray, lengths_N: np.ndarray
) -> TokenRoutingRecord:
    """The decisions of one layer, without gate weights: no rule asks for them."""
    top_k = rows["k"][0]
    experts_NSK = np.zeros((len(seqs), int(lengths_N.max(initial=0)), top_k), dtype=np.uint16)
    for n, ids in enumerate(rows["experts"]):
        experts_NSK[n, : lengths_N[n]] = np.reshape(ids, (-1, top_k))
    return TokenRoutingRecord(
        step=step,
        rank=rows["rank"][0],
        layers=np.array([layer]),
        seqs=seqs,
        experts_LNSK=experts_NSK[None],
        weights_LNSK=np.zeros((1, *experts_NSK.shape), dtype=np.float32),
        lengths_N=lengths_N,
    )


def _padded(lists: list[list | None], shape: tuple[int, int], dtype: type) -> np.ndarray | None:
    """One list per layer -> [L, E] with zeros past a layer's own experts; None where nothing was recorded."""
    if all(values is None for values in lists):
        return None
    array_LE: np.ndarray = np.zeros(shape, dtype=dtype)
    for layer, values in enumerate(lists):
        array_LE[layer, : len(values or ())] = values or ()
    return array_LE


def _alerts(rows: pa.Table) -> Iterator[AlertRecord]:
    """Transitions in the order in which they happened."""
    for row in sorted(rows.to_pylist(), key=lambda row: row["ts"]):
        row["updated_step"] = row.pop("step")
        del row["ts"]
        row["experts"] = tuple(row["experts"] or ())
        row["evidence"] = orjson.loads(row["evidence"])
        yield AlertRecord(**row)
