"""Questions about expert loads. Shares come from summed counts, never from averages of shares.

`share` is c_i / sum c (1/E when even), `load_rel` is E x share (1 when even, E/K at most).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from moeviz.store.load_memory import MOST_STEPS, LayerCounts
from moeviz.store.reader import Store

_LOD_SPANS = (10_000, 100)
_WORTH_KEEPING = 0.25
"""Part of a run that a question must ask for before its answer is kept in memory."""


def step_range(store: Store, table: str = "expert_load") -> tuple[int, int] | None:
    """First and last step with rows in `table`; None when it is empty."""
    announced = store.announced_steps(table)
    if announced is not None:
        return announced
    row = store.frame(lambda: f"SELECT min(step) AS lo, max(step) AS hi FROM {store.source(table)}").iloc[0]
    return None if pd.isna(row["lo"]) else (int(row["lo"]), int(row["hi"]))


def last_step(store: Store) -> int | None:
    """Newest step whose loads are complete; None before the first.

    Loads are flushed after the other tables, so what those say of this step is there too. A run that records
    no routing (no MoE layers in its description) counts by its scalars.
    """
    table = clock_table(store)
    announced = store.announced_steps(table)
    if announced is not None:
        return announced[1]
    newest = store.newest_step(table)
    if newest is None:
        return None
    steps = store.frame(lambda: f"SELECT max(step) AS step FROM {store.source(table, newest)}")["step"]
    return None if pd.isna(steps.iloc[0]) else int(steps.iloc[0])


def clock_table(store: Store) -> str:
    """The table that tells how far a run is: its loads, or its scalars where it records no routing."""
    return "expert_load" if store.info.model.layers else "scalars"


def load_matrix(store: Store, step: int | None = None) -> pd.DataFrame:
    """Loads of one step (default: the newest), all layers.

    Returns: layer, expert, count, share, load_rel, prob_mean (mean normalised score, NULL when not recorded),
    bias (NULL without one); ordered by layer and expert. Empty when the step was not recorded.
    """
    at = last_step(store) if step is None else step
    if at is None:
        at = -1
    return store.frame(
        lambda: (
            f"""
        WITH rows AS (
            SELECT layer, tokens, counts, prob_sum, bias, unnest(range(1, len(counts) + 1)) AS i
            FROM {store.source("expert_load", at, at)} WHERE step = ?),
        sums AS (
            SELECT layer, i - 1 AS expert, sum(counts[i])::BIGINT AS count,
                   (sum(prob_sum[i]) / sum(tokens))::FLOAT AS prob_mean, max(bias[i]) AS bias
            FROM rows GROUP BY ALL)
        SELECT layer::INTEGER AS layer, expert::INTEGER AS expert, count,
               (count / nullif(sum(count) OVER one, 0))::FLOAT AS share,
               (count * count(*) OVER one / nullif(sum(count) OVER one, 0))::FLOAT AS load_rel,
               prob_mean, bias
        FROM sums WINDOW one AS (PARTITION BY layer) ORDER BY layer, expert"""
        ),
        [at],
    )


def load_over_time(
    store: Store, layer: int, points: int = 500, first: int | None = None, last: int | None = None
) -> pd.DataFrame:
    """Loads of one layer over steps, in at most about `points` buckets (token-weighted means).

    Returns: step (first of the bucket), expert, share, load_rel; ordered by step and expert.
    Wide buckets are read from `load_lod` where merging has made it.
    """
    known = step_range(store)
    empty = pd.DataFrame({"step": [], "expert": [], "share": [], "load_rel": []})
    if known is None or not 0 <= layer < len(store.info.model.layers):
        return empty
    first = known[0] if first is None else first
    last = known[1] if last is None else last
    if last < first:
        return empty
    width = -(-(last - first + 1) // max(points, 1))
    span = next((span for span in _LOD_SPANS if width >= span), None)
    if span is None:
        return _bucketed(_counts(store, layer, first, last), first, width, first)
    width = -(-width // span) * span
    rows = [_detail(store, layer, first, last, span)]
    rows += [_counts(store, layer, lo, hi) for lo, hi in _gaps(rows[0].steps_R, first, last, span)]
    steps_R, counts_RE = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    return _bucketed(LayerCounts(steps_R, counts_RE), first // span * span, width, first)


def _counts(store: Store, layer: int, first: int, last: int) -> LayerCounts:
    """Counts of one layer in steps first..last, a row per step and rank."""
    known = step_range(store) or (0, 0)
    steps, asked = known[1] - known[0] + 1, last - first + 1
    if not store.info.packed and steps <= MOST_STEPS and asked >= _WORTH_KEEPING * steps:
        steps_R, counts_RE = store.layer_counts(layer)
        lo, hi = np.searchsorted(steps_R, [first, last + 1])
        return LayerCounts(steps_R[lo:hi], counts_RE[lo:hi])
    where = f"WHERE layer = {int(layer)} AND step BETWEEN {int(first)} AND {int(last)}"
    return _rows(
        store, layer, lambda: f"SELECT step, counts FROM {store.source('expert_load', first, last)} {where}"
    )


def _detail(store: Store, layer: int, first: int, last: int, span: int) -> LayerCounts:
    """Sums of the whole buckets of `span` steps within first..last that load_lod holds, at their first steps."""
    where = (
        f"layer = {int(layer)} AND span = {span} AND step >= {int(first)} AND step + span - 1 <= {int(last)}"
    )
    return _rows(
        store,
        layer,
        lambda: (
            f"SELECT step, counts FROM {store.source('load_lod', first, last)} WHERE {where} ORDER BY step"
        ),
    )


def _rows(store: Store, layer: int, build: Callable[[], str]) -> LayerCounts:
    rows = store.arrow(build)
    counts = rows["counts"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    num_experts = store.info.model.layers[layer].num_experts
    return LayerCounts(rows["step"].to_numpy().astype(np.int64), counts.reshape(rows.num_rows, num_experts))


def _gaps(have: np.ndarray, first: int, last: int, span: int) -> list[tuple[int, int]]:
    """Ranges of steps within first..last that buckets of `span` steps from `have` (ascending) leave out."""
    edges = np.concatenate(([first], np.repeat(have, 2) + np.tile([0, span], len(have)), [last + 1]))
    return [(int(lo), int(hi) - 1) for lo, hi in edges.reshape(-1, 2) if hi > lo]


def _bucketed(rows: LayerCounts, base: int, width: int, first: int) -> pd.DataFrame:
    """Sum counts by buckets of `width` steps from `base`."""
    bucket_R = (rows.steps_R - base) // width
    at_R = np.argsort(bucket_R, kind="stable")
    buckets, starts_B = np.unique(bucket_R[at_R], return_index=True)
    num_experts = rows.counts_RE.shape[1]
    sums_BE = np.zeros((len(buckets), num_experts), dtype=np.int64)
    if len(buckets):
        np.add.reduceat(rows.counts_RE[at_R], starts_B, axis=0, dtype=np.int64, out=sums_BE)
    total_B1 = sums_BE.sum(1, keepdims=True)
    share_BE = np.full(sums_BE.shape, np.nan)
    np.divide(sums_BE, total_B1, out=share_BE, where=total_B1 > 0)
    return pd.DataFrame(
        {
            "step": np.repeat(np.maximum(base + buckets * width, first), num_experts).astype(np.int32),
            "expert": np.tile(np.arange(num_experts, dtype=np.int32), len(buckets)),
            "share": share_BE.reshape(-1).astype(np.float32),
            "load_rel": (share_BE * num_experts).reshape(-1).astype(np.float32),
        }
    )


def load_history(store: Store, first: int, last: int) -> pd.DataFrame:
    """Loads of all layers, every step of first..last, a row per (step, layer).

    Returns: step, layer, ts, tokens, counts (array), dropped (its sum, 0 for a dropless model), entropy_nats;
    summed over ranks; ordered by step and layer.
    """
    return store.frame(
        lambda: (
            f"""
        SELECT step, layer::INTEGER AS layer, max(ts) AS ts, sum(tokens)::BIGINT AS tokens,
               CASE WHEN count(*) = 1 THEN any_value(counts)::BIGINT[] ELSE
                   [list_sum([c[i] for c in list(counts)])::BIGINT
                    for i in range(1, any_value(len(counts)) + 1)] END AS counts,
               coalesce(sum(list_sum(dropped)), 0)::BIGINT AS dropped,
               (sum(entropy_nats * tokens) / sum(tokens))::FLOAT AS entropy_nats
        FROM {store.source("expert_load", first, last)} WHERE step BETWEEN ? AND ?
        GROUP BY step, layer ORDER BY step, layer"""
        ),
        [first, last],
    )
