"""Which experts of a layer work on the same token. Undefined for k = 1.

T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from moeviz.metrics.glossary.docstrings import defines

Compat = Literal["paper", "olmoe_script"]


def coactivation_counts(ids_TK: np.ndarray, num_experts: int, compat: Compat = "paper") -> np.ndarray:
    """Tokens on which experts i and j are both active, int64 [E, E].

    The diagonal holds the tokens of each expert.

    Args:
        ids_TK: distinct expert ids of each token, by falling score.
        num_experts: E.
        compat: `paper` counts every pair (OLMoE eq. 6). `olmoe_script` counts only pairs of adjacent rank, as
            the released analysis script does: 7 of the 28 pairs at k = 8, so its values are 4 times too low.
    """
    ids_TK = np.asarray(ids_TK)
    if compat == "paper":
        active_TE = np.zeros((len(ids_TK), num_experts), dtype=np.float32)
        active_TE[np.arange(len(ids_TK))[:, None], ids_TK] = 1
        # float32 counts exactly up to 2^24 tokens; sums of chunks stay exact beyond.
        chunks = np.array_split(active_TE, len(ids_TK) // 2**22 + 1)
        return sum(np.rint(chunk.T @ chunk).astype(np.int64) for chunk in chunks)
    counts_EE = np.zeros((num_experts, num_experts), dtype=np.int64)
    left, right = ids_TK[:, :-1].ravel(), ids_TK[:, 1:].ravel()
    np.add.at(counts_EE, (left, right), 1)
    np.add.at(counts_EE, (right, left), 1)
    np.fill_diagonal(counts_EE, np.bincount(ids_TK.ravel(), minlength=num_experts))
    return counts_EE


@defines("coactivation")
def coactivation(counts_EE: np.ndarray) -> np.ndarray:
    """P(j active | i active) = N_ij / N_i, OLMoE eq. 6. [E, E], asymmetric, diagonal NaN; rows sum to k - 1.

    NaN in rows of experts that were never used.
    """
    counts_EE = np.asarray(counts_EE, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        share_EE = counts_EE / np.diag(counts_EE)[:, None]
    np.fill_diagonal(share_EE, np.nan)
    return share_EE


def coactivation_null(top_k: int, num_experts: int, compat: Compat = "paper") -> float:
    """Co-activation under random routing, (k-1)/(E-1): 11.1 % at 64 experts top-8.

    Of adjacent ranks only: 2.8 %.
    """
    share = (top_k - 1) / (num_experts - 1)
    return share if compat == "paper" else 2 * share / top_k


@defines("coactivation_lift")
def coactivation_lift(counts_EE: np.ndarray, tokens: int) -> np.ndarray:
    """N_ij N / (N_i N_j): how much more often a pair meets than if the two were independent.

    [E, E], diagonal NaN.

    1 for independence given the loads, so that busy experts do not stand out merely for being busy.
    """
    counts_EE = np.asarray(counts_EE, dtype=np.float64)
    used_E = np.diag(counts_EE)
    with np.errstate(invalid="ignore", divide="ignore"):
        lift_EE = counts_EE * tokens / np.outer(used_E, used_E)
    np.fill_diagonal(lift_EE, np.nan)
    return lift_EE


@defines("coactivation_norm")
def coactivation_norm(coactivation_EE: np.ndarray, top_k: int) -> np.ndarray:
    """Co-activation beyond chance, (coact - null) / (1 - null).

    0 for random routing, 1 for a pair always together.
    """
    null = coactivation_null(top_k, len(coactivation_EE))
    return (coactivation_EE - null) / (1 - null)
