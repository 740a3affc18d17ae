"""Levels of detail of the loads: sums over buckets of 100 and 10,000 steps, for curves over long runs.

Sums, not means of shares, because steps differ in tokens; with the smallest and largest relative load of a
step.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from moeviz.store.cover import Covered, SegmentName, cover
from moeviz.store.run import read_info
from moeviz.store.schema import segment_schema
from moeviz.store.segments import is_whole, read_segment, segment_names, write_segment

SPANS = (100, 10_000)
"""Steps per bucket; each a multiple of the one before."""


def write_detail(path: Path, now: float | None = None) -> int:
    """Write `load_lod` rows for whole buckets that have none yet. Returns how many buckets.

    A bucket is whole when every rank that writes loads has passed its last step.
    """
    now = time.time() if now is None else now
    loads = _covered(path / "expert_load", now)
    newest = _passed(loads)
    have = _recorded(path / "load_lod", now)
    first = min((one.name.first_step for one in loads if one.name.last_flush > 0), default=None)
    if newest is None or first is None:
        return 0
    span = SPANS[0]
    starts = [b for b in range(first // span * span, newest + 2 - span, span) if (b, span) not in have]
    batches = []
    for start in starts:
        rows = _bucket(path / "expert_load", loads, start, start + span)
        if rows is not None:
            batches.append(rows)
    fine = [*_read(path / "load_lod", now), *batches]
    for span in SPANS[1:]:
        coarse = [b for b in range(first // span * span, newest + 2 - span, span) if (b, span) not in have]
        batches += [rows for b in coarse if (rows := _coarsen(fine, b, span)) is not None]
    if batches:
        _write(path, pa.concat_tables(batches), now)
    return len(batches)


def _covered(folder: Path, now: float) -> list[Covered]:
    names = []
    for name in segment_names(folder):
        try:
            if is_whole(folder / name):
                names.append(name)
        except FileNotFoundError:
            continue
    return cover(names, now)


def _passed(loads: list[Covered]) -> int | None:
    """The step up to which all ranks have written, None before the first."""
    newest: dict[int, int] = {}
    for one in loads:
        if one.name.last_flush > 0:
            last = (
                one.name.last_step if one.below_step is None else min(one.name.last_step, one.below_step - 1)
            )
            newest[one.name.rank] = max(newest.get(one.name.rank, -1), last)
    return min(newest.values(), default=None)


def _recorded(folder: Path, now: float) -> set[tuple[int, int]]:
    """Buckets that have rows: (first step, span)."""
    return {
        (step, span)
        for table in _read(folder, now, ["step", "span"])
        for step, span in zip(table["step"].to_pylist(), table["span"].to_pylist(), strict=True)
    }


def _read(folder: Path, now: float, columns: list[str] | None = None) -> list[pa.Table]:
    tables = []
    for one in _covered(folder, now):
        rows = read_segment(folder, one.name)
        if one.below_step is not None:
            ends = np.asarray(rows["step"]) + np.asarray(rows["span"])
            rows = rows.filter(pa.array(ends <= one.below_step))
        tables.append(rows.select(columns) if columns else rows)
    return tables


def _bucket(folder: Path, loads: list[Covered], start: int, stop: int) -> pa.Table | None:
    """Rows of one bucket, one per layer, from the loads of its steps (summed over ranks)."""
    parts = []
    for one in loads:
        below = stop if one.below_step is None else min(stop, one.below_step)
        if one.name.last_step >= start and one.name.first_step < below:
            wanted = [("step", ">=", start), ("step", "<", below)]
            parts.append(read_segment(folder, one.name, columns=["step", "layer", "counts"], filters=wanted))
    rows = pa.concat_tables(parts).combine_chunks() if parts else None
    if rows is None or rows.num_rows == 0:
        return None
    steps, layers = rows["step"].to_numpy(), rows["layer"].to_numpy()
    counts = rows["counts"].combine_chunks()
    made = []
    for layer in np.unique(layers):
        at = np.flatnonzero(layers == layer)
        _, step_of = np.unique(steps[at], return_inverse=True)
        counts_RE = counts.take(pa.array(at)).flatten().to_numpy().reshape(len(at), -1)
        counts_TE = np.zeros((step_of.max() + 1, counts_RE.shape[1]), dtype=np.uint64)
        np.add.at(counts_TE, step_of, counts_RE.astype(np.uint64))
        made.append(_layer_row(start, stop - start, int(layer), counts_TE))
    return pa.Table.from_pylist(made, schema=segment_schema("load_lod", ""))


def _layer_row(start: int, span: int, layer: int, counts_TE: np.ndarray) -> dict[str, object]:
    total_T1 = counts_TE.sum(1, keepdims=True)
    rel_TE = counts_TE * counts_TE.shape[1] / np.maximum(total_T1, 1)
    return {
        "step": start,
        "span": span,
        "layer": layer,
        "steps": len(counts_TE),
        "assignments": int(total_T1.sum()),
        "counts": counts_TE.sum(0),
        "lo": rel_TE.min(0).astype(np.float32),
        "hi": rel_TE.max(0).astype(np.float32),
    }


def _coarsen(fine: list[pa.Table], start: int, span: int) -> pa.Table | None:
    """Rows of one wide bucket from those of the narrow ones, or None while some are missing."""
    rows = pa.concat_tables(table.cast(segment_schema("load_lod", "")) for table in fine).to_pandas()
    rows = rows[(rows["span"] == SPANS[0]) & (rows["step"] >= start) & (rows["step"] < start + span)]
    if rows["step"].nunique() * SPANS[0] != span:
        return None
    merged = [
        {
            "step": start,
            "span": span,
            "layer": int(layer),
            "steps": int(one["steps"].sum()),
            "assignments": int(one["assignments"].sum()),
            "counts": np.stack(one["counts"].to_list()).sum(0),
            "lo": np.stack(one["lo"].to_list()).min(0),
            "hi": np.stack(one["hi"].to_list()).max(0),
        }
        for layer, one in rows.groupby("layer")
    ]
    return pa.Table.from_pylist(merged, schema=segment_schema("load_lod", ""))


def _write(path: Path, rows: pa.Table, now: float) -> None:
    info = read_info(path)
    attempt = info.attempts[-1]
    parsed = (SegmentName.parse(name) for name in segment_names(path / "load_lod"))
    taken = max(
        (n.last_flush for n in parsed if n and (n.rank, n.attempt) == (0, attempt.number)), default=-1
    )
    starts, spans = np.asarray(rows["step"]), np.asarray(rows["span"])
    name = SegmentName(
        rank=0,
        attempt=attempt.number,
        from_step=attempt.from_step,
        first_flush=taken + 1,
        last_flush=taken + 1,
        first_step=int(starts.min()),
        last_step=int((starts + spans - 1).max()),
        level=0,
        active_ms=int(now * 1000),
    )
    write_segment(path / "load_lod", name, rows.cast(segment_schema("load_lod", info.run_id)))
