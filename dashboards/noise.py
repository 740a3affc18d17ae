"""How much of what a load figure shows is sampling noise, for the view's layer and step."""

from __future__ import annotations

import numpy as np
import pandas as pd

from moeviz.alerts.config import AlertConfig
from moeviz.metrics.load import Experts
from moeviz.metrics.noise import entropy_gap_floor, even_load_sd, gini_floor, maxvio_floor

DESIGN_EFFECT = AlertConfig().design_effect_prior
"""Tokens of one sequence resemble each other; a cautious default where it has not been estimated."""


def band(
    tokens: float, top_k: Experts, num_experts: Experts, design_effect: float = DESIGN_EFFECT
) -> np.ndarray:
    """Half width of the band around the even share: two standard deviations of a relative load. Broadcasts."""
    return 2 * even_load_sd(max(tokens, 1), top_k, num_experts, design_effect)


def floor(metric: str, tokens: float, top_k: int, num_experts: int) -> float | None:
    """What perfect balance would show with independent tokens; None where a metric has no such floor."""
    shape = (max(tokens, 1), top_k, num_experts)
    gap = float(entropy_gap_floor(*shape))
    floors = {
        "load_entropy": 1 - gap / np.log(num_experts),
        "n_eff": num_experts * np.exp(-gap),
        "maxvio_batch": float(maxvio_floor(*shape)),
        "gini": float(gini_floor(*shape)),
    }
    return float(floors[metric]) if metric in floors else None


def tokens_of(loads: pd.DataFrame, top_k: int) -> float:
    """Tokens behind the `count` column of one layer's loads."""
    return float(loads["count"].sum()) / top_k
