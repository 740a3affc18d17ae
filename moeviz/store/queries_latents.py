"""Questions about latents of attention: which were recorded, how they look, how they changed over steps.

Shapes: X heads (1 where all share a latent), S rows of a picture, C numbers of a latent or slots, R singular values.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from moeviz.metrics import GROUPS
from moeviz.store.reader import Store

LATENT_METRICS = tuple(metric.id for metric in GROUPS["latent attention"])
"""Names in the table metrics whose `layer` is a transformer block."""


class LatentArrays(NamedTuple):
    """The latents of one layer at one step."""

    heads_X: tuple[int | None, ...]
    """None: all heads share it."""
    tokens: int
    """Tokens behind `profile_XC`."""
    seq: int
    first: int
    """Token of the sequence that the first row of the picture is."""
    length: int
    """Tokens behind the rows of the picture."""
    grid_XSC: np.ndarray
    """float32, to 1/510 of the span of each head's picture."""
    singular_XR: np.ndarray
    """float32."""
    profile_XC: np.ndarray
    """float32."""


def latent_index(store: Store) -> pd.DataFrame:
    """Which latents were recorded. Returns: step, layer (block), name, heads, seq, tokens; ordered by these."""
    return store.frame(
        lambda: (
            f"""
        SELECT step, layer::INTEGER AS layer, name, count(*)::INTEGER AS heads, min(seq)::INTEGER AS seq,
               min(tokens) AS tokens
        FROM {store.source("latents")} WHERE rank = 0 GROUP BY ALL ORDER BY step, layer, name"""
        )
    )


def latent_arrays(store: Store, step: int, layer: int, name: str) -> LatentArrays | None:
    """One layer's latents of one step, by head. None when they were not recorded.

    Args:
        layer: transformer block.
        name: kv, q, read or write.
    """
    found = store.arrow(
        lambda: (
            f"""
        SELECT head, tokens, seq, first, length, rows, cols, singular, profile, lo, hi, grid
        FROM {store.source("latents", step, step)}
        WHERE step = $step AND layer = $layer AND name = $name AND rank = 0 ORDER BY head"""
        ),
        {"step": step, "layer": layer, "name": name},
    )
    if found.num_rows == 0:
        return None
    rows = found.to_pylist()
    grids = []
    for at, row in enumerate(rows):
        codes_SC = found["grid"][at].values.to_numpy(zero_copy_only=False).reshape(row["rows"], row["cols"])
        grids.append(row["lo"] + codes_SC * np.float32((row["hi"] - row["lo"]) / 255))
    return LatentArrays(
        heads_X=tuple(row["head"] for row in rows),
        tokens=rows[0]["tokens"],
        seq=rows[0]["seq"],
        first=rows[0]["first"],
        length=rows[0]["length"],
        grid_XSC=np.stack(grids).astype(np.float32),
        singular_XR=np.array([row["singular"] for row in rows], dtype=np.float32),
        profile_XC=np.array([row["profile"] for row in rows], dtype=np.float32),
    )


def latent_spectra(store: Store, layer: int, name: str, last: int | None = None) -> pd.DataFrame:
    """Singular values over steps, each as a share of their sum.

    Returns: step, place (1 for the largest), value, share; heads averaged; ordered by step and place.
    """
    return store.frame(
        lambda: (
            f"""
        WITH each AS (
            SELECT step, generate_subscripts(singular, 1)::INTEGER AS place, unnest(singular) AS value,
                   list_sum(singular) AS total
            FROM {store.source("latents", None, last)}
            WHERE layer = $layer AND name = $name AND rank = 0 AND step <= coalesce($last, step))
        SELECT step, place, avg(value) AS value, avg(value / nullif(total, 0)) AS share
        FROM each GROUP BY ALL ORDER BY step, place"""
        ),
        {"layer": layer, "name": name, "last": last},
    )


def latent_profiles(store: Store, layer: int, name: str, last: int | None = None) -> pd.DataFrame:
    """The profile over steps: spread of each number, entropy or mass of each slot (see the table `latents`).

    Returns: step, place (0-based number or slot), value; heads averaged; ordered by step and place.
    """
    return store.frame(
        lambda: (
            f"""
        WITH each AS (
            SELECT step, generate_subscripts(profile, 1)::INTEGER - 1 AS place, unnest(profile) AS value
            FROM {store.source("latents", None, last)}
            WHERE layer = $layer AND name = $name AND rank = 0 AND step <= coalesce($last, step))
        SELECT step, place, avg(value) AS value FROM each GROUP BY ALL ORDER BY step, place"""
        ),
        {"layer": layer, "name": name, "last": last},
    )


def latent_metrics(store: Store, last: int | None = None) -> pd.DataFrame:
    """What latents add up to, over steps. Returns: step, layer (block), name, value; ordered by name, layer, step."""
    return store.frame(
        lambda: (
            f"""
        SELECT step, layer::INTEGER AS layer, name, value FROM {store.source("metrics", None, last)}
        WHERE list_contains($names, name) AND step <= coalesce($last, step) ORDER BY name, layer, step"""
        ),
        {"names": list(LATENT_METRICS), "last": last},
    )
