"""What a tracker is told of a record: few numbers, and the loads of every layer as one picture.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeviz.colors import load_level, load_ramp
from moeviz.records import AlertRecord, LoadRecord, MetricRecord, ModelInfo, Record, ScalarRecord

PREFIX = "routing/"
"""Before the names of metrics, so that they do not mix with a project's own."""

_CELL_PIXELS = 8
_ABSENT = np.array([128, 128, 128], dtype=np.uint8)
_DEAD = np.array([229, 72, 77], dtype=np.uint8)


@dataclass(frozen=True, kw_only=True, eq=False)
class Digest:
    """What one record says to a tracker."""

    step: int
    values: Mapping[str, float] = field(default_factory=dict)
    load_LE: np.ndarray | None = None
    """Relative load E x share, 1 for an even one; NaN past a layer's own number of experts."""


def digest_of(record: Record, model: ModelInfo, every: int) -> Digest | None:
    """What is told of a record; None for nothing.

    Args:
        record: scalars are told always, metrics and loads every `every` steps.
        model: says how many experts each layer has.
        every: steps.
    """
    if isinstance(record, ScalarRecord):
        return Digest(step=record.step, values=dict(record.values)) if record.values else None
    if isinstance(record, MetricRecord) and record.step % every == 0:
        return Digest(step=record.step, values=dict(_over_layers(record)))
    if isinstance(record, LoadRecord) and record.step % every == 0 and record.tokens > 0:
        return Digest(step=record.step, load_LE=relative_load(record.counts_LE, model))
    return None


def relative_load(counts_LE: np.ndarray, model: ModelInfo) -> np.ndarray:
    """E x share of each expert in its layer, NaN past the layer's own experts."""
    size_L1 = np.array([[layer.num_experts] for layer in model.layers])
    total_L1 = counts_LE.sum(1, keepdims=True)
    load_LE = counts_LE * size_L1 / np.maximum(total_L1, 1)
    return np.where(np.arange(counts_LE.shape[1]) < size_L1, load_LE, np.nan)


def load_picture(load_LE: np.ndarray) -> np.ndarray:
    """Loads as uint8 [8 L, 8 E, 3]: layers downwards, blue below an even load, orange above, red without any."""
    level_LE = load_level(load_LE)
    colors_LE3 = np.where((level_LE < 0)[..., None], _DEAD, load_ramp()[np.maximum(level_LE, 0)])
    colors_LE3 = np.where(np.isnan(load_LE)[..., None], _ABSENT, colors_LE3)
    return colors_LE3.repeat(_CELL_PIXELS, 0).repeat(_CELL_PIXELS, 1)


def load_values(load_LE: np.ndarray) -> np.ndarray:
    """Loads of the experts that there are, for a histogram."""
    return load_LE[~np.isnan(load_LE)]


def alert_title(alert: AlertRecord) -> str:
    """The rule, where, and whether it was raised or cleared."""
    place = "run" if alert.layer is None else f"layer {alert.layer}"
    return f"{alert.rule}, {place}: {'cleared' if alert.cleared_step is not None else alert.severity}"


def alert_text(alert: AlertRecord) -> str:
    """What happened and what to do."""
    return f"step {alert.updated_step}: {alert.message}; {alert.remedy}"


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= (
            flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        )
    return flat


def _over_layers(record: MetricRecord) -> Iterator[tuple[str, float]]:
    for name, value in record.values.items():
        finite = np.asarray(value, dtype=np.float64)
        finite = finite[np.isfinite(finite)] if finite.ndim else finite
        if not finite.ndim:
            yield PREFIX + name, float(finite)
        elif finite.size:
            yield f"{PREFIX}{name}/mean", float(finite.mean())
            yield f"{PREFIX}{name}/min", float(finite.min())
            yield f"{PREFIX}{name}/max", float(finite.max())
