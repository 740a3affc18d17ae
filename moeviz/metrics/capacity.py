"""What a limit on tokens per expert drops, and what it would drop from a perfectly balanced router.

C = ceil(cf N k/E) slots per expert (Megatron `get_capacity` with num_tokens x top_k; Switch
Transformers eq. 3 is the case k = 1). Counts c are always taken before the drop.
"""

from __future__ import annotations

import math

import numpy as np

from moeviz.metrics.glossary.docstrings import defines
from moeviz.metrics.load import Experts
from moeviz.metrics.noise import Number, even_load_sd


def capacity(tokens: int, top_k: int, num_experts: int, capacity_factor: float) -> int:
    """Slots per expert, ceil(cf N k / E)."""
    return math.ceil(capacity_factor * tokens * top_k / num_experts)


@defines("overflow")
def overflow(counts_LE: np.ndarray, slots: int) -> np.ndarray:
    """Assignments past each expert's slots, in units of the slots, max(0, c_i - C)/C. `[..., E]`."""
    return np.maximum(np.asarray(counts_LE) - slots, 0) / slots


@defines("drop_rate")
def drop_rate(dropped_LE: np.ndarray, counts_LE: np.ndarray) -> np.ndarray:
    """Share of the assignments that were dropped, sum(dropped) / (N k): 0 to 1."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(dropped_LE).sum(axis=-1) / np.asarray(counts_LE).sum(axis=-1)


@defines("token_drop")
def token_drop(kept_TK: np.ndarray) -> float:
    """Share of the tokens that lost all their experts; they pass through the residual stream alone."""
    return float((~np.asarray(kept_TK, dtype=bool)).all(axis=-1).mean())


def implied_capacity_factor(
    counts_LE: np.ndarray, dropped_LE: np.ndarray, num_experts: Experts
) -> np.ndarray:
    """Capacity factor read off the drops.

    The fullest expert that dropped something kept cf N k/E assignments.

    NaN where nothing was dropped. Exact when the limit acts on the whole step; a lower bound when it acts on
    micro-batches, which are not all full.
    """
    counts_LE, dropped_LE = np.asarray(counts_LE, dtype=np.float64), np.asarray(dropped_LE)
    kept_L = np.where(dropped_LE > 0, counts_LE - dropped_LE, -np.inf).max(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        factor_L = kept_L * num_experts / counts_LE.sum(axis=-1)
    return np.where(np.isfinite(factor_L), factor_L, np.nan)


@defines("expected_drop")
def expected_drop(
    capacity_factor: Number,
    tokens: Number,
    top_k: Experts,
    num_experts: Experts,
    design_effect: Number = 1.0,
) -> np.ndarray:
    """Drop rate of a perfectly balanced router.

    Sd [phi(z) - z (1 - Phi(z))], z = (cf - 1)/sd, sd of `even_load_sd`.

    The mean excess of a normal load over its limit: 1.5 % at cf = 1 for E = 8, k = 2, N = 2048; 0 at cf =
    1.25.
    """
    sd = even_load_sd(tokens, top_k, num_experts, design_effect)
    z = (np.asarray(capacity_factor, dtype=np.float64) - 1) / sd
    upper_tail = np.array([0.5 * math.erfc(x / math.sqrt(2)) for x in np.ravel(z)]).reshape(np.shape(z))
    return sd * (np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) - z * upper_tail)
