"""What jobs on a probe found: one tidy table, every value beside its null."""

from __future__ import annotations

import pandas as pd

from moeviz.store.reader import Store


def analysis(store: Store, part: str | None = None, layer: int | None = None) -> pd.DataFrame:
    """What `moeviz analyze` stored, newest job only.

    Args:
        part: `run`, `layer`, `expert` or `head`; None: all.
        layer: MoE layer (the block for heads); None: all.

    Returns: part, layer, unit (NULL where there is none), name, label, value, null_mean, null_sd, hidden (chance
    explains it: less than three standard deviations from the null). Ordered by part, layer, name, unit, label.
    Empty when nothing was analysed.
    """
    return store.frame(
        lambda: (
            f"""
        SELECT part, layer::INTEGER AS layer, unit::INTEGER AS unit, name, label, value, null_mean, null_sd,
               coalesce(abs(value - null_mean) < 3 * null_sd, false) AS hidden
        FROM {store.source("analysis")}
        WHERE step = (SELECT max(step) FROM {store.source("analysis")})
          AND ($part IS NULL OR part = $part) AND ($layer IS NULL OR layer = $layer)
        ORDER BY part, layer, name, unit, label"""
        ),
        {"part": part, "layer": layer},
    )
