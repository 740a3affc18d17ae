"""Questions about expert loads. Shares come from summed counts, never from averages of shares.

`share` is c_i / sum c (1/E when even), `load_rel` is E x share (1 when even, E/K at most).
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from moeviz.store.reader import Store

_LOD_SPANS = (10_000, 100)


def step_range(store: Store, table: str = "expert_load") -> tuple[int, int] | None:
    """First and last step with rows in `table`; None when it is empty."""
    row = store.frame(lambda: f"SELECT min(step) AS lo, max(step) AS hi FROM {store.source(table)}").iloc[0]
    return None if pd.isna(row["lo"]) else (int(row["lo"]), int(row["hi"]))


def last_step(store: Store) -> int | None:
    """Newest step whose loads are complete; None before the first.

    Loads are flushed after the other tables, so what those say of this step is there too. A run that records
    no routing (no MoE layers in its description) counts by its scalars.
    """
    table = clock_table(store)
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
    if known is None:
        return empty
    first = known[0] if first is None else first
    last = known[1] if last is None else last
    if last < first:
        return empty
    width = -(-(last - first + 1) // max(points, 1))
    span = next((span for span in _LOD_SPANS if width >= span), None)
    if span is None:
        return _bucketed(store, layer, first, last, width, first, None)
    width = -(-width // span) * span
    return _bucketed(store, layer, first, last, width, first // span * span, span)


def _bucketed(
    store: Store, layer: int, first: int, last: int, width: int, base: int, span: int | None
) -> pd.DataFrame:
    """Sum counts by bucket of `width` steps from `base`; whole buckets of `span` steps come from load_lod."""
    gaps = [(first, last)] if span is None else _gaps(store, layer, first, last, span)
    parts: list[str] = []

    def build() -> str:
        parts.clear()
        if span is not None:
            parts.append(
                f"SELECT step, counts FROM {store.source('load_lod')} "
                f"WHERE layer = {layer} AND span = {span} AND step >= {first} AND step + span - 1 <= {last}"
            )
        for lo, hi in gaps:
            parts.append(
                f"SELECT step, counts FROM {store.source('expert_load', lo, hi)} "
                f"WHERE layer = {layer} AND step BETWEEN {lo} AND {hi}"
            )
        return f"""
        WITH rows AS ({" UNION ALL BY NAME ".join(parts)}),
        each AS (SELECT (step - {base}) // {width} AS bucket, unnest(counts) AS count,
                        unnest(range(len(counts))) AS expert FROM rows),
        sums AS (SELECT bucket, expert, sum(count) AS count FROM each GROUP BY ALL)
        SELECT greatest({base} + bucket * {width}, {first})::INTEGER AS step, expert::INTEGER AS expert,
               (count / nullif(sum(count) OVER one, 0))::FLOAT AS share,
               (count * count(*) OVER one / nullif(sum(count) OVER one, 0))::FLOAT AS load_rel
        FROM sums WINDOW one AS (PARTITION BY bucket) ORDER BY step, expert"""

    return store.frame(build)


def _gaps(store: Store, layer: int, first: int, last: int, span: int) -> list[tuple[int, int]]:
    """Ranges of steps within first..last that load_lod does not hold in whole buckets of `span`."""
    have = store.frame(
        lambda: (
            f"""SELECT DISTINCT step FROM {store.source("load_lod")}
        WHERE layer = {layer} AND span = {span} AND step >= {first} AND step + span - 1 <= {last}
        ORDER BY step"""
        )
    )["step"].to_numpy()
    edges = np.concatenate(([first], np.repeat(have, 2) + np.tile([0, span], len(have)), [last + 1]))
    return [(int(lo), int(hi) - 1) for lo, hi in edges.reshape(-1, 2) if hi > lo]


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
