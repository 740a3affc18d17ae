"""Whether experts, and the hidden states they receive, have become alike.

Balanced load can hide redundant experts.

T tokens of a probe, E experts, D width, F hidden width of an expert.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeviz.metrics.glossary.docstrings import defines


@defines("expert_w_cos")
def cosines(rows_ED: np.ndarray) -> np.ndarray:
    """Cosine of every pair of rows (router rows, flattened weights). [E, E], -1 to 1, diagonal 1.

    NaN for zero rows.
    """
    rows_ED = np.asarray(rows_ED, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit_ED = rows_ED / np.linalg.norm(rows_ED, axis=1, keepdims=True)
    return unit_ED @ unit_ED.T


class PairSummary(NamedTuple):
    """Of the off-diagonal entries of a similarity matrix."""

    mean: float
    max: float


@defines("router_cos")
def off_diagonal(matrix_EE: np.ndarray) -> PairSummary:
    """Mean and largest similarity of two different experts. `router_cos` is this of the router's rows."""
    others = np.asarray(matrix_EE)[~np.eye(len(matrix_EE), dtype=bool)]
    return PairSummary(mean=float(others.mean()), max=float(others.max()))


@defines("linear_cka")
def linear_cka(outputs_TD: np.ndarray, other_TD: np.ndarray) -> float:
    """Linear centred kernel alignment of two experts' outputs on the same tokens. 0 to 1.

    Kornblith et al. 2019. Blind to permutations and rotations of the units, which cosines of weights are not.
    """
    x_TD = outputs_TD - outputs_TD.mean(axis=0)
    y_TD = other_TD - other_TD.mean(axis=0)
    cross = np.linalg.norm(x_TD.T @ y_TD) ** 2
    return float(cross / (np.linalg.norm(x_TD.T @ x_TD) * np.linalg.norm(y_TD.T @ y_TD)))


def cka_matrix(outputs_ETD: np.ndarray) -> np.ndarray:
    """`linear_cka` of every pair of experts, [E, E], diagonal 1; NaN for an expert with constant outputs.

    ||X'Y||^2 = <XX', YY'>: with the T x T products of all experts side by side it is one matrix product.
    """
    centred_ETD = outputs_ETD - outputs_ETD.mean(axis=1, keepdims=True)
    kernel_EX = (centred_ETD @ centred_ETD.transpose(0, 2, 1)).reshape(len(centred_ETD), -1)
    return cosines(kernel_EX)


@defines("pes")
def pes(outputs_TED: np.ndarray) -> float:
    """Pairwise expert similarity.

    Mean over tokens and pairs of cos(f_i(x), f_j(x)), *all* experts run on each token.

    -1 to 1. SimBal (arXiv 2506.14038) reports 0.0044, an auxiliary loss 0.0255.
    """
    num_experts = outputs_TED.shape[1]
    unit_TED = outputs_TED / np.maximum(np.linalg.norm(outputs_TED, axis=-1, keepdims=True), 1e-30)
    # The squared length of the sum of unit vectors is E plus twice the sum over pairs.
    squared_T = np.linalg.norm(unit_TED.sum(axis=1), axis=-1) ** 2
    return float(((squared_T - num_experts) / (num_experts * (num_experts - 1))).mean())


class Scatter(NamedTuple):
    """Spread of hidden states grouped by expert: small values mean tokens sit on their expert's centroid."""

    rc: float
    """Tr(S_W pinv(S_B)).

    The measure of representation collapse of X-MoE (arXiv 2204.09179), after neural collapse.
    """
    ratio: float
    """Tr S_W / Tr S_B: the same question without an inverse."""


@defines("rc")
def representation_collapse(hidden_TD: np.ndarray, experts_T: np.ndarray) -> Scatter:
    """Within- against between-expert covariance of the hidden states, grouped by first choice. Both >= 0.

    S_W is the mean over experts of the covariance within, S_B the covariance of the experts' centroids around
    their mean; experts without tokens are left out. inf when all centroids coincide.
    """
    # S_B has rank E - 1 at most, so its inverse needs the E centroids alone, and S_W only along their directions.
    hidden_TD = np.asarray(hidden_TD, dtype=np.float64)
    kinds, place_T = np.unique(experts_T, return_inverse=True)
    counts_E = np.bincount(place_T)
    centroid_ED = np.stack([hidden_TD[place_T == place].mean(axis=0) for place in range(len(kinds))])
    weight_T = 1 / (counts_E[place_T] * len(kinds))
    within_TD = hidden_TD - centroid_ED[place_T]
    _, size_R, axes_RD = np.linalg.svd(centroid_ED - centroid_ED.mean(axis=0), full_matrices=False)
    seen_R = size_R > 1e-10 * max(size_R.max(initial=0), np.abs(centroid_ED).max(initial=0))
    if not seen_R.any():
        return Scatter(rc=float("inf"), ratio=float("inf"))
    between_R = size_R[seen_R] ** 2 / len(kinds)
    along_R = weight_T @ (within_TD @ axes_RD[seen_R].T) ** 2
    return Scatter(
        rc=float((along_R / between_R).sum()),
        ratio=float(weight_T @ (within_TD**2).sum(axis=1) / between_R.sum()),
    )


@defines("coupling")
def coupling(scores_TE: np.ndarray, activation_norms_TE: np.ndarray) -> float:
    """Spearman correlation of router score and size of the expert's activation, over all (token, expert).

    -1 to 1: does the router prefer experts that respond? Reported to fall under an auxiliary loss (arXiv
    2605.12476).
    """
    first, second = _ranks(np.ravel(scores_TE)), _ranks(np.ravel(activation_norms_TE))
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; ties share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((2 * last - counts + 1) / 2)[place]
