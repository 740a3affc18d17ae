"""How tokens travel from layer to layer.

E experts of a layer, F of the next, K experts per token, L layers, T tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from moeviz.metrics.glossary.docstrings import defines
from moeviz.metrics.load import entropy_nats

Pairs = Literal["first", "all", "rank"]


def crossing_counts(
    from_ids_TK: np.ndarray,
    to_ids_TK: np.ndarray,
    num_from: int,
    num_to: int,
    *,
    pairs: Pairs = "first",
    from_weights_TK: np.ndarray | None = None,
    to_weights_TK: np.ndarray | None = None,
) -> np.ndarray:
    """Tokens that use expert i in one layer and j in a later one, float64 [E, F].

    Args:
        from_ids_TK: experts of the earlier layer by falling score.
        to_ids_TK: experts of the later layer, same tokens.
        num_from: E.
        num_to: F.
        pairs: `first` joins first choices; `all` joins every pair of experts, weighted by the product of
            their gate weights (each token adds up to 1); `rank` joins rank r with rank r, as OLMoE's released
            script does.
        from_weights_TK: gate weights, used by `all`; equal ones where None.
        to_weights_TK: likewise.
    """
    table = np.zeros((num_from, num_to))
    if pairs == "all":
        from_TK, to_TK = _unit(from_weights_TK, from_ids_TK), _unit(to_weights_TK, to_ids_TK)
        weight_TKK = from_TK[:, :, None] * to_TK[:, None, :]
        left, right = np.broadcast_arrays(from_ids_TK[:, :, None], to_ids_TK[:, None, :])
        np.add.at(table, (left.ravel(), right.ravel()), weight_TKK.ravel())
        return table
    columns = slice(0, 1) if pairs == "first" else slice(None)
    np.add.at(table, (from_ids_TK[:, columns].ravel(), to_ids_TK[:, columns].ravel()), 1)
    return table


def _unit(weights_TK: np.ndarray | None, ids_TK: np.ndarray) -> np.ndarray:
    weights_TK = np.ones(ids_TK.shape) if weights_TK is None else np.asarray(weights_TK, dtype=np.float64)
    return weights_TK / np.maximum(weights_TK.sum(axis=1, keepdims=True), 1e-30)


@defines("transition")
def transition(table_EF: np.ndarray) -> np.ndarray:
    """P(j in the later layer | i in the earlier one). [E, F], rows sum to 1; NaN for an unused expert.

    ExFlow's inter-layer expert affinity (arXiv 2401.08383). Its mutual information, uncertainty coefficient
    and conditional entropy are those of `information` on the same table: OLMoE-1B-7B on C4 layers 0 to 7
    0.450 nats, 7 to 15 0.883; Mixtral-8x7B 0.060 and 0.099.
    """
    table_EF = np.asarray(table_EF, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return table_EF / table_EF.sum(axis=1, keepdims=True)


class Paths(NamedTuple):
    """How many ways tokens take through the first choices of all layers."""

    tokens: int
    distinct: int
    """Different paths taken; `distinct / tokens` near 1 means the sample is too small to say more."""
    entropy_nats: float

    @property
    def effective(self) -> float:
        """exp(H): number of equally frequent paths with the same entropy. Depends on the number of tokens."""
        return float(np.exp(self.entropy_nats))


@defines("path_entropy")
def paths(first_ids_LT: np.ndarray) -> Paths:
    """Count the L-tuples of first choices. State the number of tokens with the result.

    The support is huge.
    """
    _, counts = np.unique(np.asarray(first_ids_LT).T, axis=0, return_counts=True)
    tokens = int(counts.sum())
    return Paths(tokens=tokens, distinct=len(counts), entropy_nats=float(entropy_nats(counts / tokens)))
