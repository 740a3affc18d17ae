"""Questions about sampled tokens: their text, their experts, one sequence through all layers.

Shapes: L layers, S sequence, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from moeviz.store.reader import Store


class TraceArrays(NamedTuple):
    """One sequence through all recorded layers. A slot that a layer lacks has expert -1 and weight 0."""

    layers_L: np.ndarray
    """int. MoE layer of each entry of axis L."""
    experts_LSK: np.ndarray
    """int32."""
    weights_LSK: np.ndarray
    """float32, to 1/255 of the largest weight of the sequence and layer (or of 1)."""
    token_ids_S: np.ndarray
    """int32; -1 where the text was not recorded."""
    texts: tuple[str, ...]
    """Text of each token; `#ID` where the vocabulary does not know it."""
    loss_S: np.ndarray
    """float32, nats, of predicting the next token; NaN where unknown."""
    domain: str | None


def sequences(store: Store, last: int = 50) -> pd.DataFrame:
    """The newest sampled sequences.

    Returns: step, rank, seq, domain, n_tokens, mean_loss (nats; NULL without losses); newest step first.
    """
    return store.frame(
        lambda: (
            f"""
        SELECT step, rank::INTEGER AS rank, seq::INTEGER AS seq, domain, n_tokens,
               list_avg(list_filter(token_loss, lambda x: NOT isnan(x))) AS mean_loss
        FROM {store.source("sequences")} ORDER BY step DESC, rank, seq LIMIT ?"""
        ),
        [last],
    )


def trace_arrays(store: Store, step: int, seq: int, rank: int = 0) -> TraceArrays:
    """One sampled sequence as arrays; no layers when its routing was not recorded."""
    key = {"step": step, "seq": seq, "rank": rank}
    where = "WHERE step = $step AND seq = $seq AND rank = $rank"
    routing = store.arrow(
        lambda: (
            f"""SELECT layer, n_tokens, k, experts, weights, weight_scale
        FROM {store.source("routing", step, step)} {where} ORDER BY layer"""
        ),
        key,
    )
    text = store.frame(
        lambda: f"SELECT domain, token_ids, token_loss FROM {store.source('sequences', step, step)} {where}",
        key,
    )
    length = int(routing["n_tokens"][0].as_py()) if routing.num_rows else 0
    token_ids_S, loss_S, domain = np.full(length, -1, np.int32), np.full(length, np.nan, np.float32), None
    if len(text):
        domain, ids, loss = text.iloc[0]
        domain = domain if isinstance(domain, str) else None
        token_ids_S = np.asarray(ids, dtype=np.int32)
        loss_S = np.asarray(
            loss if isinstance(loss, np.ndarray) else np.full(len(ids), np.nan), dtype=np.float32
        )
    experts_LSK, weights_LSK = _stack(routing, len(token_ids_S))
    return TraceArrays(
        layers_L=routing["layer"].to_numpy().astype(np.int64),
        experts_LSK=experts_LSK,
        weights_LSK=weights_LSK,
        token_ids_S=token_ids_S,
        texts=token_texts(store, token_ids_S),
        loss_S=loss_S,
        domain=domain,
    )


def _stack(routing: pa.Table, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one sequence -> experts and weights [L, S, K], padded to the largest K."""
    ks = routing["k"].to_numpy()
    shape = (routing.num_rows, length, int(max(ks, default=0)))
    experts_LSK, weights_LSK = np.full(shape, -1, dtype=np.int32), np.zeros(shape, dtype=np.float32)
    columns = (routing[name] for name in ("experts", "weights", "weight_scale"))
    for at, (k, experts, codes, scale) in enumerate(zip(ks, *columns, strict=True)):
        experts_LSK[at, :, :k] = experts.values.to_numpy(zero_copy_only=False).reshape(-1, k)
        codes_SK = codes.values.to_numpy(zero_copy_only=False).reshape(-1, k)
        weights_LSK[at, :, :k] = codes_SK * np.float32(scale.as_py() / 255)
    return experts_LSK, weights_LSK


def token_flow(store: Store, step: int, seq: int, rank: int = 0) -> pd.DataFrame:
    """One sampled sequence as rows.

    Returns: pos, token_id, text, layer, slot, expert, weight, token_loss; ordered by layer, pos and slot.
    Empty when its routing was not recorded.
    """
    trace = trace_arrays(store, step, seq, rank)
    layer_at, pos, slot = np.nonzero(trace.experts_LSK >= 0)
    return pd.DataFrame(
        {
            "pos": pos,
            "token_id": trace.token_ids_S[pos],
            "text": pd.array(trace.texts, dtype="str").take(pos),
            "layer": trace.layers_L[layer_at],
            "slot": slot,
            "expert": trace.experts_LSK[layer_at, pos, slot],
            "weight": trace.weights_LSK[layer_at, pos, slot],
            "token_loss": trace.loss_S[pos],
        }
    )


def token_texts(store: Store, token_ids: Iterable[int]) -> tuple[str, ...]:
    """The text of each id; `#ID` where the vocabulary does not know it."""
    ids = [int(token_id) for token_id in token_ids]
    known = store.frame(
        lambda: f"SELECT token_id, text FROM {store.vocab()} WHERE list_contains(?, token_id)",
        [sorted(set(ids))],
    )
    texts = dict(zip(known["token_id"].tolist(), known["text"].tolist(), strict=True))
    return tuple(texts.get(token_id, f"#{token_id}") for token_id in ids)


def attention_index(store: Store) -> pd.DataFrame:
    """Which attention maps were recorded. Returns: step, layer, head, seq, rows, cols; ordered by these."""
    return store.frame(
        lambda: (
            f"""
        SELECT DISTINCT step, layer::INTEGER AS layer, head::INTEGER AS head, seq::INTEGER AS seq, rows, cols
        FROM {store.source("attention")} ORDER BY ALL"""
        )
    )


def attention_map(store: Store, step: int, layer: int, head: int, seq: int) -> np.ndarray | None:
    """One map, float32 [Q, C], each row exact to 1/510 of its maximum. None when it was not recorded."""
    found = store.arrow(
        lambda: (
            f"""
        SELECT rows, cols, row_max, map FROM {store.source("attention", step, step)}
        WHERE step = $step AND layer = $layer AND head = $head AND seq = $seq ORDER BY rank LIMIT 1"""
        ),
        {"step": step, "layer": layer, "head": head, "seq": seq},
    )
    if found.num_rows == 0:
        return None
    shape = (found["rows"][0].as_py(), found["cols"][0].as_py())
    row_max_Q = found["row_max"][0].values.to_numpy(zero_copy_only=False)
    codes_QC = found["map"][0].values.to_numpy(zero_copy_only=False).reshape(shape)
    return codes_QC * (row_max_Q[:, None] / np.float32(255))
