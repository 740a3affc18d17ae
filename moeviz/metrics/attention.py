"""What heads look at, from row-stochastic causal maps `[..., S, S]`: rows are queries, columns keys.

Leading axes (layers, heads) are kept. Maps of sampled sequences only; a map that was pooled for display is no
input.
"""

from __future__ import annotations

import numpy as np

from moeviz.metrics.change import jensen_shannon
from moeviz.metrics.glossary.docstrings import defines
from moeviz.metrics.load import entropy_nats


@defines("attn_entropy")
def attn_entropy(maps_SS: np.ndarray) -> np.ndarray:
    """Mean over queries t >= 2 of H(A_t) / ln t: 0 looks at one key, 1 at all alike. Leading shape.

    Near 0 in many heads is the entropy collapse of Zhai et al. 2023.
    """
    length = maps_SS.shape[-1]
    return (entropy_nats(maps_SS)[..., 1:] / np.log(np.arange(2, length + 1))).mean(axis=-1)


@defines("sink_mass")
def sink_mass(maps_SS: np.ndarray, key: int = 0) -> np.ndarray:
    """Mean attention that queries at or after a key pay to it (the first by default): 0 to 1.

    Leading shape.
    """
    return maps_SS[..., key:, key].mean(axis=-1)


@defines("sink_rate")
def sink_rate(maps_LHSS: np.ndarray, threshold: float = 0.3) -> float:
    """Share of heads with `sink_mass` above the threshold: 0 to 1.

    Gu et al. 2025 use 0.3 on 64 tokens, and report 18 % for their default model of 60M parameters.
    """
    return float((sink_mass(maps_LHSS) > threshold).mean())


def pattern_share(maps_SS: np.ndarray, pattern_SS: np.ndarray) -> np.ndarray:
    """Share of a head's attention that lies on a 0/1 pattern, sum(A x P) / sum(A). Leading shape.

    The `mul` score of TransformerLens' head detector.
    """
    return (maps_SS * pattern_SS).sum(axis=(-1, -2)) / maps_SS.sum(axis=(-1, -2))


@defines("prev_token")
def prev_token(maps_SS: np.ndarray) -> np.ndarray:
    """Share of attention on the previous token: 1 for a previous-token head."""
    return pattern_share(maps_SS, np.eye(maps_SS.shape[-1], k=-1))


@defines("duplicate")
def duplicate_pattern(token_ids_S: np.ndarray) -> np.ndarray:
    """1 where a key before the query holds the same token. [S, S]."""
    return np.tril(token_ids_S[:, None] == token_ids_S[None, :], k=-1).astype(np.float64)


@defines("induction")
def induction_pattern(token_ids_S: np.ndarray) -> np.ndarray:
    """1 where the key follows an earlier occurrence of the query's token. [S, S].

    Measure on random tokens repeated twice: on natural text, frequent pairs look like induction.
    """
    pattern_SS = np.zeros((len(token_ids_S), len(token_ids_S)))
    pattern_SS[:, 1:] = duplicate_pattern(token_ids_S)[:, :-1]
    return np.tril(pattern_SS)


@defines("head_redundancy")
def head_redundancy(maps_HSS: np.ndarray) -> float:
    """1 - mean Jensen-Shannon divergence of every pair of heads / ln 2.

    1 when all heads of a layer do the same.
    """
    heads = len(maps_HSS)
    pairs = [
        jensen_shannon(maps_HSS[first], maps_HSS[second]).mean()
        for first in range(heads)
        for second in range(first + 1, heads)
    ]
    return 1 - float(np.mean(pairs)) / float(np.log(2))


@defines("attn_distance")
def attn_distance(maps_SS: np.ndarray) -> np.ndarray:
    """Mean over queries of sum_j A_ij (i - j), tokens: how far back a head looks. Leading shape."""
    at_S = np.arange(maps_SS.shape[-1])
    return (maps_SS * (at_S[:, None] - at_S[None, :])).sum(axis=-1).mean(axis=-1)
