"""What experts are for: domains, vocabulary, repetition.

D domains, V token types, E experts, K experts per token.

Two cautions to print beside any of these. Routing mirrors the geometry of hidden states and the syntactic
type of tokens more than human topics. And rare tokens look specialised by chance: a token seen once has "100
%" specialisation for each of its k experts, so draw the null (`vocab_spec_null`) next to every value.
"""

from __future__ import annotations

import itertools
from math import comb

import numpy as np

from moeviz.metrics.glossary.docstrings import defines
from moeviz.metrics.information import mutual_information
from moeviz.metrics.load import entropy_nats


@defines("domain_spec")
def domain_spec(counts_DE: np.ndarray, tokens_D: np.ndarray) -> np.ndarray:
    """Share of a domain's tokens that use expert i, N_iD / N_D. [D, E], 0 to 1.

    Rows sum to k, random routing k/E.

    OLMoE eq. 7. Published maxima: OLMoE-1B-7B 97.7 % (layer 0, arXiv, expert 0), Mixtral-8x7B 33.2 % (random:
    25 %).
    """
    return np.asarray(counts_DE) / np.asarray(tokens_D, dtype=np.float64)[:, None]


@defines("nmi_domain")
def nmi_domain(counts_DE: np.ndarray) -> float:
    """I(domain; expert) / ln D with every domain weighted equally. 0 to 1.

    OLMoE-1B-7B layers 0, 7, 15: 0.072, 0.172, 0.216; Mixtral-8x7B 0.001 to 0.004. Plug-in: with few tokens
    take the permutation null from `information.information`.
    """
    share_DE = counts_DE / np.sum(counts_DE, axis=1, keepdims=True)
    return mutual_information(share_DE) / float(np.log(len(share_DE)))


def vocab_counts(
    types_N: np.ndarray, ids_NK: np.ndarray, num_experts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(type ids [V], occurrences N_x [V], assignments N_x,i [V, E]) of tokens and their experts.

    `types_N` may be the input token, the next token, or the predicted one: three different questions.
    """
    kinds_V, place_N, occurrences_V = np.unique(types_N, return_inverse=True, return_counts=True)
    cells = (place_N[:, None] * num_experts + ids_NK).ravel()
    table_VE = np.bincount(cells, minlength=len(kinds_V) * num_experts).reshape(-1, num_experts)
    return kinds_V, occurrences_V, table_VE


@defines("vocab_spec")
def vocab_spec(table_VE: np.ndarray, occurrences_V: np.ndarray) -> np.ndarray:
    """Share of a token type's occurrences that use expert i, N_x,i / N_x. [V, E], 0 to 1. OLMoE eq. 8."""
    return table_VE / np.asarray(occurrences_V, dtype=np.float64)[:, None]


@defines("vocab_spec_layer")
def vocab_spec_layer(
    table_VE: np.ndarray, occurrences_V: np.ndarray, *, min_count: int = 10, by_token: bool = False
) -> float:
    """Mean over token types of the largest `vocab_spec`. 0 to 1; NaN when no type is frequent enough.

    Args:
        table_VE: assignments of each type to each expert.
        occurrences_V: occurrences of each type.
        min_count: leave out rarer types. 1 is what OLMoE's layer analysis does, where types seen once always
            read 100 %; a third of its types are.
        by_token: weight types by their occurrences.
    """
    frequent_V = np.asarray(occurrences_V) >= min_count
    if not frequent_V.any():
        return float("nan")
    best_V = vocab_spec(table_VE, occurrences_V)[frequent_V].max(axis=1)
    return float(np.average(best_V, weights=np.asarray(occurrences_V)[frequent_V] if by_token else None))


def vocab_spec_null(
    occurrences: int, top_k: int, num_experts: int, *, draws: int = 2000, seed: int = 0
) -> float:
    """Largest `vocab_spec` of a type seen `occurrences` times under random routing, by simulation.

    1 for a single occurrence, 0.42 for ten at 64 experts top-8, k/E in the limit.
    """
    rng = np.random.default_rng(seed)
    used = np.zeros((draws, num_experts), dtype=np.int64)
    rows = np.arange(draws)[:, None]
    for _ in range(occurrences):
        chosen = np.argpartition(rng.random((draws, num_experts)), top_k - 1, axis=1)[:, :top_k]
        used[rows, chosen] += 1
    return float(used.max(axis=1).mean() / occurrences)


@defines("expert_token_entropy")
def expert_token_entropy(table_CE: np.ndarray) -> np.ndarray:
    """Entropy of the token classes that each expert receives, nats. [E], 0 to ln C; NaN for an unused expert.

    ST-MoE: encoder experts 1.2 to 2.2, decoder experts 3.4, uniform 3.5 = ln 32.
    """
    total_E = np.sum(table_CE, axis=0, keepdims=True).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return entropy_nats((table_CE / total_E).T)


@defines("mi_domain_given_token")
def mi_domain_given_token(
    domains_N: np.ndarray,
    types_N: np.ndarray,
    experts_N: np.ndarray,
    num_experts: int,
    *,
    min_count: int = 50,
) -> float:
    """I(domain; expert | token type), nats: what is left of domain specialisation once vocabulary is known.

    Over types seen at least `min_count` times and in two domains or more, weighted by occurrence; NaN without
    any.
    """
    kinds, place_N = np.unique(types_N, return_inverse=True)
    order_N = np.argsort(place_N, kind="stable")
    bounds = np.searchsorted(place_N[order_N], np.arange(len(kinds) + 1))
    domain_ids_N = np.unique(domains_N, return_inverse=True)[1]
    total, weight = 0.0, 0
    for start, stop in itertools.pairwise(bounds):
        mine = order_N[start:stop]
        if stop - start < min_count or len(np.unique(domain_ids_N[mine])) < 2:
            continue
        cells = domain_ids_N[mine] * num_experts + np.asarray(experts_N)[mine]
        table_DE = np.bincount(cells, minlength=(domain_ids_N.max() + 1) * num_experts).reshape(
            -1, num_experts
        )
        total += (stop - start) * mutual_information(table_DE)
        weight += stop - start
    return total / weight if weight else float("nan")


@defines("repeat_first")
def repeat_first(ids_SK: np.ndarray) -> float:
    """Share of consecutive tokens of a sequence with the same first choice; 1/E at random.

    Mixtral table 5.
    """
    return float((ids_SK[..., 1:, 0] == ids_SK[..., :-1, 0]).mean())


@defines("repeat_any")
def repeat_any(ids_SK: np.ndarray) -> float:
    """Share of consecutive tokens of a sequence that share an expert; at random `repeat_any_null`.

    Mixtral table 5.
    """
    shared_SK = (ids_SK[..., 1:, :, None] == ids_SK[..., :-1, None, :]).any(axis=-1)
    return float(shared_SK.any(axis=-1).mean())


def repeat_any_null(top_k: int, num_experts: int) -> float:
    """`repeat_any` of random routing, 1 - C(E-k, k)/C(E, k): 46.4 % at 8 experts top-2."""
    return 1 - comb(num_experts - top_k, top_k) / comb(num_experts, top_k)
