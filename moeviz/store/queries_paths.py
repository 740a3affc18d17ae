"""Questions that count over many sampled tokens: paths, experts chosen together, tokens of an expert.

Counting is numpy's: fetching lists and multiplying matrices beats unnesting them in SQL by two to four times.
Shapes: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa

from moeviz.errors import MoevizError
from moeviz.store.queries_tokens import token_texts
from moeviz.store.reader import Store

_CHUNK_TOKENS = 1 << 16
_KEY = ["step", "rank", "seq"]


class _Decisions:
    """Sampled routing of some layers: a row per (layer, step, rank, seq), and the flat lists behind them."""

    def __init__(
        self,
        store: Store,
        layers: Sequence[int],
        first: int | None,
        last: int | None,
        weighted: bool = False,
    ) -> None:
        """Read steps first..last. Without gate weights, which are half of the bytes, unless `weighted`."""
        for layer in layers:
            num_experts(store, layer)
        wanted = ", ".join(str(int(layer)) for layer in sorted(set(layers)))
        lists = "experts, weights" if weighted else "experts"
        table = store.arrow(
            lambda: (
                f"""
            SELECT layer::INTEGER AS layer, step, rank, seq, n_tokens, k, weight_scale, {lists}
            FROM {store.source("routing", first, last)}
            WHERE layer IN ({wanted}) AND {_between(first, last)}"""
            )
        )
        names = ["layer", *_KEY, "n_tokens", "k", "weight_scale"]
        self.rows = table.select(names).to_pandas()
        self._experts, starts = _flat(table["experts"])
        self._codes = _flat(table["weights"])[0] if weighted else None
        self.rows["start"] = starts
        self.rows = self.rows.sort_values(["layer", *_KEY], ignore_index=True)

    def top1(self, rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """First expert and gate weight (1 unless `weighted`) of every token of `rows`: int64 [T], float64 [T]."""
        at_T, row_T = _spread(rows["n_tokens"].to_numpy())
        position_T = rows["start"].to_numpy()[row_T] + at_T * rows["k"].to_numpy()[row_T]
        experts_T = self._experts[position_T].astype(np.int64)
        if self._codes is None:
            return experts_T, np.ones(len(experts_T))
        return experts_T, self._codes[position_T] * (rows["weight_scale"].to_numpy()[row_T] / 255)

    def chosen(self, rows: pd.DataFrame, size: int) -> Iterator[np.ndarray]:
        """Which experts each token of `rows` chose, float32 0 or 1 [T, E], in chunks of whole sequences."""
        tokens = np.cumsum(rows["n_tokens"].to_numpy())
        for _, chunk in rows.groupby(tokens // _CHUNK_TOKENS):
            lengths, ks = chunk["n_tokens"].to_numpy(), chunk["k"].to_numpy()
            at, row = _spread(lengths * ks)
            token = (np.cumsum(lengths) - lengths)[row] + at // ks[row]
            chosen_TE = np.zeros((int(lengths.sum()), size), dtype=np.float32)
            chosen_TE[token, self._experts[chunk["start"].to_numpy()[row] + at]] = 1
            yield chosen_TE


def transitions(
    store: Store,
    layers: Sequence[int],
    first: int | None = None,
    last: int | None = None,
    domain: str | None = None,
    weighted: bool = False,
) -> pd.DataFrame:
    """How tokens move between the top-1 experts of successive entries of `layers`.

    Args:
        layers: two or more MoE layers, in the order to be joined.
        first, last: steps, inclusive; None: all.
        domain: only sequences of this domain.
        weighted: count a token as the product of its two gate weights instead of 1.

    Returns: source_layer, source, target_layer, target, count, expected (row total x column total / total:
    what independent layers would give), lift (count / expected); only pairs that occur, ordered by these
    columns.
    """
    if len(layers) < 2:
        raise MoevizError(f"layers={list(layers)} has no successive pair; give two or more layers")
    decisions = _Decisions(store, layers, first, last, weighted)
    if domain is not None:
        of_domain = store.frame(
            lambda: (
                f"""SELECT DISTINCT step, rank, seq FROM {store.source("sequences", first, last)}
            WHERE domain = ? AND {_between(first, last)}"""
            ),
            [domain],
        )
        decisions.rows = decisions.rows.merge(of_domain, on=_KEY)
    pairs = [_pair(store, decisions, source, target, weighted) for source, target in pairwise(layers)]
    return pd.concat(pairs, ignore_index=True)


def _pair(
    store: Store, decisions: _Decisions, source_layer: int, target_layer: int, weighted: bool
) -> pd.DataFrame:
    rows = decisions.rows
    sources, targets = rows[rows["layer"] == source_layer], rows[rows["layer"] == target_layer]
    in_both = sources[_KEY].merge(targets[_KEY], on=_KEY)
    source_T, source_weights_T = decisions.top1(in_both.merge(sources, on=_KEY))
    target_T, target_weights_T = decisions.top1(in_both.merge(targets, on=_KEY))
    shape = num_experts(store, source_layer), num_experts(store, target_layer)
    weights_T = source_weights_T * target_weights_T if weighted else None
    counts = np.bincount(source_T * shape[1] + target_T, weights=weights_T, minlength=shape[0] * shape[1])
    counts = counts.reshape(shape)
    source, target = np.nonzero(counts)
    expected = counts.sum(1)[source] * (counts.sum(0)[target] / max(counts.sum(), 1e-300))
    return pd.DataFrame(
        {
            "source_layer": np.full(len(source), source_layer),
            "source": source,
            "target_layer": np.full(len(source), target_layer),
            "target": target,
            "count": counts[source, target],
            "expected": expected,
            "lift": counts[source, target] / expected,
        }
    )


def coactivation(store: Store, layer: int, first: int | None = None, last: int | None = None) -> np.ndarray:
    """How many tokens chose both experts i and j of `layer`, int64 [E, E]; the diagonal: chose i at all."""
    size = num_experts(store, layer)
    decisions = _Decisions(store, [layer], first, last)
    counts = np.zeros((size, size), dtype=np.int64)
    for chosen_TE in decisions.chosen(decisions.rows, size):
        counts += (chosen_TE.T @ chosen_TE).astype(np.int64)
    return counts


def expert_tokens(
    store: Store,
    layer: int,
    expert: int,
    limit: int = 50,
    first: int | None = None,
    last: int | None = None,
    min_count: int = 5,
) -> pd.DataFrame:
    """Which tokens an expert takes more often than its share of all tokens says.

    Returns: token_id, text, count (tokens with this id routed to the expert, any slot), total (tokens with
    this id), lift (count / total over the expert's coverage, 1 at random); best lift first. Ids seen less
    than `min_count` times are left out, because a rare token reaches any lift by chance.
    """
    size = num_experts(store, layer)
    decisions = _Decisions(store, [layer], first, last)
    table = store.arrow(
        lambda: (
            f"""SELECT step, rank, seq, n_tokens AS length, token_ids
        FROM {store.source("sequences", first, last)} WHERE {_between(first, last)}"""
        )
    )
    token_ids, starts = _flat(table["token_ids"])
    rows = decisions.rows.merge(
        table.select([*_KEY, "length"]).to_pandas().assign(text_start=starts), on=_KEY
    )
    rows = rows[rows["length"] == rows["n_tokens"]]
    at_T, row_T = _spread(rows["n_tokens"].to_numpy())
    ids_T = token_ids[rows["text_start"].to_numpy()[row_T] + at_T]
    hits = [chosen_TE[:, expert] for chosen_TE in decisions.chosen(rows, size)]
    hits_T = np.concatenate(hits) if hits else np.zeros(0)
    total = np.bincount(ids_T, minlength=1)
    count = np.bincount(ids_T, weights=hits_T, minlength=1).astype(np.int64)
    known = np.flatnonzero((total >= min_count) & (count > 0))
    lift = count[known] / total[known] / (hits_T.mean() if len(known) else 1)
    best = np.lexsort((known, -count[known], -lift))[:limit]
    return pd.DataFrame(
        {
            "token_id": known[best],
            "text": list(token_texts(store, known[best])),
            "count": count[known][best],
            "total": total[known][best],
            "lift": lift[best],
        }
    )


def num_experts(store: Store, layer: int) -> int:
    """E of one MoE layer. Raises MoevizError for a layer that the model does not have."""
    layers = store.info.model.layers
    if not 0 <= layer < len(layers):
        raise MoevizError(f"layer={layer} is not one of the model's MoE layers, 0 to {len(layers) - 1}")
    return layers[layer].num_experts


def _between(first: int | None, last: int | None) -> str:
    lower = "" if first is None else f" AND step >= {int(first)}"
    upper = "" if last is None else f" AND step <= {int(last)}"
    return f"true{lower}{upper}"


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists -> all values, and where each list starts in them."""
    lists = column.combine_chunks()
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    return lists.flatten().to_numpy(zero_copy_only=False), np.cumsum(lengths) - lengths


def _spread(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of rows -> for every element of every row its position in the row, and the row's index."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    return np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row], row
