"""The head grid and one large attention map, packed on one square-root scale from 0 to 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dashboards.components import component, pack, pack_unit

THUMB = 32
"""Side of a small map at most."""
_NO_WEIGHT = 255


def head_grid(data: dict[str, Any], layer: int, head: int, on_head: Callable[[], None]) -> None:
    """Mount the grid; a click or Enter calls `on_head`, with layer and head in `st.session_state["head_grid"]`."""
    component("head_grid")(
        key="head_grid", data={**data, "layer": layer, "head": head}, on_head_change=on_head
    )


def attention(data: dict[str, Any]) -> None:
    component("attention")(key="attention", data=data)


def head_grid_data(
    maps: Mapping[tuple[int, int], np.ndarray], layers: Sequence[int], heads: Sequence[int]
) -> dict[str, Any]:
    """Small maps of all recorded heads.

    Args:
        maps: (layer, head) -> weights [Q, C]; a missing head stays blank.
        layers, heads: rows and columns of the grid.
    """
    sides = [max(weights.shape) for weights in maps.values()]
    size = min(THUMB, max(sides, default=1))
    thumbs = np.full((len(layers), len(heads), size, size), _NO_WEIGHT, dtype=np.uint8)
    facts: list[list[str]] = []
    for row, layer in enumerate(layers):
        for col, head in enumerate(heads):
            weights_QC = maps.get((layer, head))
            facts.append(["not recorded"] if weights_QC is None else head_facts(weights_QC))
            if weights_QC is not None:
                thumbs[row, col] = thumbnail(weights_QC, size)
    return {
        "layers": list(layers),
        "heads": list(heads),
        "size": size,
        "thumbs": pack(thumbs, "u1"),
        "facts": facts,
        "alt": f"Attention maps of {len(heads)} heads in {len(layers)} layers. Arrow keys move, Enter opens a head.",
    }


def thumbnail(weights_QC: np.ndarray, size: int) -> np.ndarray:
    """Square-root codes [size, size], the largest of each block; 255 where the block lies in the future."""
    rows, cols = weights_QC.shape
    codes = np.rint(np.sqrt(np.clip(weights_QC, 0, 1)) * 254).astype(np.uint8)
    row_at, col_at = np.arange(rows) * size // rows, np.arange(cols) * size // cols
    small = np.zeros((size, size), dtype=np.uint8)
    np.maximum.at(small, (row_at[:, None], col_at[None, :]), codes)
    if is_causal(weights_QC):
        small[np.triu_indices(size, 1)] = _NO_WEIGHT
    return small


def is_causal(weights_QC: np.ndarray) -> bool:
    """Whether no query reads a later token: a square map with nothing above its diagonal."""
    return weights_QC.shape[0] == weights_QC.shape[1] and not np.triu(weights_QC, 1).any()


def head_facts(weights_QC: np.ndarray) -> list[str]:
    """What kind of head this looks like, in two numbers: weight on the first token, weight on the previous one."""
    rest = weights_QC[1:]
    first = float(rest[:, 0].mean()) if len(rest) else 1.0
    before = float(np.diagonal(weights_QC, -1).mean()) if len(rest) else 0.0
    return [f"{first:.0%} on the first token", f"{before:.0%} on the token before"]


def attention_data(
    weights_QC: np.ndarray, texts: Sequence[str], id: str, q_len: int | None = None
) -> dict[str, Any]:
    """One large map with the text of its tokens.

    Args:
        weights_QC: rows are queries.
        texts: of each row; left out when the map was pooled, since a row is then a block of tokens.
        id: names the map's sequence; the pinned query stays while it does.
        q_len: queries before pooling.
    """
    rows, cols = weights_QC.shape
    return {
        "id": id,
        "rows": rows,
        "cols": cols,
        "map": pack_unit(np.sqrt(np.clip(weights_QC, 0, 1))),
        "causal": is_causal(weights_QC),
        "texts": list(texts) if len(texts) == rows == cols else [],
        "block": max(1, round((q_len or rows) / rows)),
        "alt": f"Attention weights of {rows} queries on {cols} keys. Up and down arrows move between queries.",
    }
