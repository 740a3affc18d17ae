"""A routed sequence as coloured text with its expert ribbon; everything but the sequence is decided in the browser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dashboards.components import component, pack
from moeviz.store.queries import TraceArrays

_LOSS_QUANTILE = 0.98


def tokens(data: dict[str, Any], layer: int, expert: int | None, on_move: Callable[[], None]) -> None:
    """Mount the text; `on_move` is called when a hand let go of the layer dial or pressed an expert."""
    component("tokens")(
        key="tokens", data={**data, "layer": layer, "expert": expert}, on_place_change=on_move
    )


def tokens_data(trace: TraceArrays, id: str) -> dict[str, Any]:
    """One sequence, packed.

    Args:
        trace: the sequence through all recorded layers.
        id: names the sequence; the browser rebuilds the text when it changes.
    """
    layers, length, top_k = trace.experts_LSK.shape
    known_S = trace.loss_S[np.isfinite(trace.loss_S)]
    domain = f" of domain {trace.domain}" if trace.domain else ""
    return {
        "id": id,
        "layers": layers,
        "tokens": length,
        "k": top_k,
        "experts": pack(trace.experts_LSK, "u2"),
        "weights": pack(np.rint(255 * np.clip(trace.weights_LSK, 0, 1)), "u1"),
        "loss": pack(trace.loss_S, "f4"),
        "loss_max": float(np.quantile(known_S, _LOSS_QUANTILE)) if len(known_S) else 1.0,
        "texts": list(trace.texts),
        "ids": trace.token_ids_S.tolist(),
        "ribbon": "Expert ribbon: one row per layer, one column per token, coloured like the text. Hues rank the "
        "experts within a layer, the most used first in orange. With an expert pressed, only its "
        "tokens are shown: where they come from and where they go. Click a row to move the text to that layer.",
        "alt": f"{length} tokens{domain} coloured by expert. Left and right arrows read tokens, up and down change the "
        "layer, Escape clears the filter.",
    }
