"""The load map: every expert of every layer now, beside each layer's load entropy over recent steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dashboards import noise
from dashboards.components import component, grouped, pack, pack_unit
from moeviz.colors import LOAD_TICKS, SEVERITY_COLORS, SEVERITY_MARKS, load_level
from moeviz.live import Snapshot

_BAND_LOG2 = (0.05, 1.0)
"""Narrowest and widest band that is drawn as even: never nothing, never more than half to double."""
_WORST_FIRST = ("critical", "error", "warning", "info")


def load_map(
    data: dict[str, Any], layer: int | None, expert: int | None, on_select: Callable[[], None]
) -> None:
    """Mount the load map; a click or Enter calls `on_select`, with the cell in `st.session_state["load_map"]`."""
    component("load_map")(
        key="load_map", data={**data, "layer": layer, "expert": expert}, on_cell_change=on_select
    )


def noise_log2(snapshot: Snapshot) -> np.ndarray:
    """Half width [L, 1] of the band that is drawn as even, in log2 units."""
    widths = np.array([layer.num_experts for layer in snapshot.info.layers])
    top_k = np.array([layer.top_k for layer in snapshot.info.layers])
    return np.clip(np.log2(1 + noise.band(snapshot.tokens, top_k, widths)), *_BAND_LOG2)[:, None]


def load_map_data(snapshot: Snapshot) -> dict[str, Any]:
    """The heat map and the entropy rows, packed; everything that changes only when the revision does."""
    layers, experts = snapshot.load_rel_LE.shape
    band = noise_log2(snapshot)
    unit = max(layer.num_experts / layer.top_k for layer in snapshot.info.layers) / 65535  # of two bytes
    history_TL = snapshot.load_entropy_TL
    return {
        "layers": layers,
        "experts": experts,
        "widths": [layer.num_experts for layer in snapshot.info.layers],
        "level": pack(load_level(snapshot.load_rel_LE, band) + 1, "u1"),
        "load": pack(np.rint(np.nan_to_num(snapshot.load_rel_LE) / unit), "u2"),
        "smooth": pack(np.rint(np.nan_to_num(snapshot.load_rel_ema_LE) / unit), "u2"),
        "unit": unit,
        "history": pack_unit(history_TL),
        "steps": [int(step) for step in snapshot.history_steps_T],
        "entropy": [f"{value:.2f}".replace("0.", ".") if value < 1 else "1.0" for value in history_TL[-1]],
        "alarms": [_alarm(snapshot, layer) for layer in range(layers)],
        "ticks": [list(tick) for tick in LOAD_TICKS],
        "noise": f"× no token at all  ·  blank: within sampling noise, ±{2 ** float(band.mean()) - 1:.0%}",
        "alt": alt_text(snapshot),
    }


def alt_text(snapshot: Snapshot) -> str:
    """What the map shows, in words, for those who do not see it."""
    load_LE = np.nan_to_num(snapshot.load_rel_LE, nan=-1.0)
    layer, expert = (int(at) for at in np.unravel_index(load_LE.argmax(), load_LE.shape))
    worst = int(np.nanargmin(snapshot.load_entropy_TL[-1]))
    unused = int((snapshot.load_rel_LE == 0).sum())
    return (
        f"Load of {snapshot.info.max_experts} experts in {snapshot.info.num_layers} layers at step "
        f"{grouped(snapshot.step)}. Largest: expert {expert} of layer {layer}, {load_LE[layer, expert]:.1f} times the "
        f"even share. Lowest load entropy: {snapshot.load_entropy_TL[-1, worst]:.2f} of its maximum, in layer {worst}. "
        f"{unused} experts got no token. Arrow keys read the cells, Enter selects one."
    )


def _alarm(snapshot: Snapshot, layer: int) -> dict[str, str] | None:
    found = [alert.severity for alert in snapshot.open_alerts if alert.layer == layer]
    worst = next((severity for severity in _WORST_FIRST if severity in found), None)
    return {"mark": SEVERITY_MARKS[worst], "color": SEVERITY_COLORS[worst]} if worst else None
