"""From a reading of a probe to numbers with their nulls: what experts specialise on, who works with whom, how alike.

Every function takes arrays and returns `AnalysisValue`s; the quantities themselves are defined in `moeviz.metrics`.
A null breaks the link in question and nothing else: domain labels move between whole sequences, because tokens of one
sequence depend on each other; token ids move between tokens.

Shapes: N sequences of S tokens, T = N*S, L layers, E experts, K experts per token, D domains, V token types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moeviz.inspection.probe_batch import ProbeBatch
from moeviz.inspection.readings import LayerReading
from moeviz.metrics import coactivation, load, paths, similarity, specialization
from moeviz.metrics.information import Null, conditional_entropy, contingency, information
from moeviz.metrics.losses import router_orth
from moeviz.records import AnalysisValue

ROUNDS = 20
"""Permutations of a null."""
TOP_TOKENS, MIN_COUNT = 5, 10
"""Token types listed per expert, and how often one must occur."""


Number = float | np.floating[Any] | np.ndarray
"""A number of numpy or Python; an array must hold one."""


def layer_value(
    layer: int,
    name: str,
    value: Number,
    null_mean: Number = np.nan,
    null_sd: Number = np.nan,
    label: str = "",
) -> AnalysisValue:
    return AnalysisValue(
        part="layer",
        layer=layer,
        index=-1,
        name=name,
        value=float(value),
        null_mean=float(null_mean),
        null_sd=float(null_sd),
        label=label,
    )


def expert_value(
    layer: int,
    expert: int | np.integer[Any],
    name: str,
    value: Number,
    null_mean: Number = np.nan,
    null_sd: Number = np.nan,
    label: str = "",
) -> AnalysisValue:
    return AnalysisValue(
        part="expert",
        layer=layer,
        index=int(expert),
        name=name,
        value=float(value),
        null_mean=float(null_mean),
        null_sd=float(null_sd),
        label=label,
    )


def dependence(layer: int, reading: LayerReading, probe: ProbeBatch) -> list[AnalysisValue]:
    """Information of first choices about token, position and domain, nats, plug-in beside its permutation null.

    `u_...` is the share of the first choices' entropy that is known, without what chance would know.
    """
    num_seqs, length = probe.token_ids_NS.shape
    num_experts, first_T = reading.probs_TE.shape[1], reading.ids_TK[:, 0]
    sequences_T = np.repeat(np.arange(num_seqs), length)
    labels: dict[str, tuple[np.ndarray, Null]] = {
        "mi_token": (probe.token_ids_NS.ravel(), "tokens"),
        "mi_pos": (np.tile(np.arange(length), num_seqs), "rotations"),
    }
    if probe.tells_domains:
        labels["mi_domain"] = (np.repeat(probe.domain_ids_N, length), "sequences")
    found = []
    for name, (labels_T, null) in labels.items():
        known = information(labels_T, first_T, num_experts, null=null, sequences_N=sequences_T, rounds=ROUNDS)
        found.append(layer_value(layer, name, known.plugin, known.null_mean, known.null_sd))
        found.append(layer_value(layer, name.replace("mi_", "u_"), known.coefficient))
    return found + _domain_beyond_vocabulary(layer, reading, probe)


def _domain_beyond_vocabulary(layer: int, reading: LayerReading, probe: ProbeBatch) -> list[AnalysisValue]:
    """`mi_domain_given_token` against domains exchanged between sequences; nothing where no token is frequent."""
    if not probe.tells_domains:
        return []
    num_experts, types_T = reading.probs_TE.shape[1], probe.token_ids_NS.ravel()

    def beyond(domain_N: np.ndarray) -> float:
        domains_T = np.repeat(domain_N, probe.token_ids_NS.shape[1])
        return specialization.mi_domain_given_token(domains_T, types_T, reading.ids_TK[:, 0], num_experts)

    value = beyond(probe.domain_ids_N)
    if np.isnan(value):
        return []
    rng = np.random.default_rng(0)
    null_R = np.array([beyond(rng.permutation(probe.domain_ids_N)) for _ in range(ROUNDS)])
    return [layer_value(layer, "mi_domain_given_token", value, np.nanmean(null_R), np.nanstd(null_R))]


def domains(layer: int, reading: LayerReading, probe: ProbeBatch) -> list[AnalysisValue]:
    """`domain_spec` of every expert and domain and `nmi_domain` of the layer, over all K assignments."""
    if not probe.tells_domains:
        return []
    num_experts, names = reading.probs_TE.shape[1], probe.names
    counts_NE = sequence_counts(reading.ids_TK, num_experts, len(probe.domains))
    domain_N, length = probe.domain_ids_N, probe.token_ids_NS.shape[1]

    def spec(domain_N: np.ndarray) -> tuple[np.ndarray, float]:
        member_DN = np.eye(len(names))[:, domain_N]
        counts_DE = member_DN @ counts_NE
        tokens_D = member_DN.sum(axis=1) * length
        return specialization.domain_spec(counts_DE, tokens_D), specialization.nmi_domain(counts_DE)

    value_DE, nmi = spec(domain_N)
    rng = np.random.default_rng(0)
    nulls = [spec(rng.permutation(domain_N)) for _ in range(ROUNDS)]
    null_RDE, null_nmi_R = np.stack([each for each, _ in nulls]), np.array([each for _, each in nulls])
    mean_DE, sd_DE = null_RDE.mean(axis=0), null_RDE.std(axis=0)
    found = [layer_value(layer, "nmi_domain", nmi, null_nmi_R.mean(), null_nmi_R.std())]
    return found + [
        expert_value(
            layer, expert, "domain_spec", value_DE[at, expert], mean_DE[at, expert], sd_DE[at, expert], name
        )
        for at, name in enumerate(names)
        for expert in range(num_experts)
    ]


def sequence_counts(ids_TK: np.ndarray, num_experts: int, num_seqs: int) -> np.ndarray:
    """Assignments of each sequence to each expert, [N, E]."""
    ids_NX = ids_TK.reshape(num_seqs, -1)
    cells = np.arange(num_seqs)[:, None] * num_experts + ids_NX
    return np.bincount(cells.ravel(), minlength=num_seqs * num_experts).reshape(num_seqs, num_experts)


def vocabulary(
    layer: int, reading: LayerReading, probe: ProbeBatch, texts: Sequence[str], predicted_NS: np.ndarray
) -> list[AnalysisValue]:
    """`vocab_spec_layer` against shuffled tokens, and the tokens each expert takes most beyond its share.

    By the token that is read, and labelled `next token` and `predicted token` by the one that follows and the one that
    the model expects. The null of one token and expert is the expert's share of all tokens, with the binomial spread
    of N_x draws.
    """
    ids_NSK = reading.ids_TK.reshape(*probe.token_ids_NS.shape, -1)
    types_T = probe.token_ids_NS.ravel()
    found = [
        _vocabulary_of_layer(layer, reading, types_T, reading.ids_TK, ""),
        _vocabulary_of_layer(
            layer,
            reading,
            probe.token_ids_NS[:, 1:].ravel(),
            ids_NSK[:, :-1].reshape(-1, ids_NSK.shape[-1]),
            "next token",
        ),
        _vocabulary_of_layer(layer, reading, predicted_NS.ravel(), reading.ids_TK, "predicted token"),
    ]
    num_experts = reading.probs_TE.shape[1]
    kinds_V, seen_V, table_VE = specialization.vocab_counts(types_T, reading.ids_TK, num_experts)
    share_VE = specialization.vocab_spec(table_VE, seen_V)
    cover_E = table_VE.sum(axis=0) / len(types_T)
    sd_VE = np.sqrt(cover_E * (1 - cover_E) / seen_V[:, None])
    for expert in np.flatnonzero(cover_E):
        z_V = (share_VE[:, expert] - cover_E[expert]) / np.maximum(sd_VE[:, expert], 1e-12)
        z_V = np.where(seen_V >= MIN_COUNT, z_V, -np.inf)
        for at in np.argsort(-z_V, kind="stable")[:TOP_TOKENS]:
            if z_V[at] > 3:
                token = int(kinds_V[at])
                text = texts[token] if token < len(texts) else f"#{token}"
                value, sd = share_VE[at, expert], sd_VE[at, expert]
                found.append(expert_value(layer, expert, "vocab_spec", value, cover_E[expert], sd, text))
    return found


def _vocabulary_of_layer(
    layer: int, reading: LayerReading, types_T: np.ndarray, ids_TK: np.ndarray, label: str
) -> AnalysisValue:
    num_experts, rng = reading.probs_TE.shape[1], np.random.default_rng(0)

    def measure(types_T: np.ndarray) -> float:
        _, seen_V, table_VE = specialization.vocab_counts(types_T, ids_TK, num_experts)
        return specialization.vocab_spec_layer(table_VE, seen_V)

    null_R = [measure(rng.permutation(types_T)) for _ in range(ROUNDS)]
    return layer_value(
        layer, "vocab_spec_layer", measure(types_T), np.mean(null_R), np.std(null_R), label=label
    )


def repeats(layer: int, reading: LayerReading, probe: ProbeBatch) -> list[AnalysisValue]:
    """Consecutive tokens with the same expert, against tokens in random order (which keeps the loads)."""
    shape = probe.token_ids_NS.shape
    rng = np.random.default_rng(0)
    found = []
    measures: dict[str, Callable[[np.ndarray], float]] = {
        "repeat_first": specialization.repeat_first,
        "repeat_any": specialization.repeat_any,
    }
    for name, measure in measures.items():
        value = measure(reading.ids_TK.reshape(*shape, -1))
        null_R = [measure(rng.permutation(reading.ids_TK).reshape(*shape, -1)) for _ in range(ROUNDS)]
        found.append(layer_value(layer, name, value, np.mean(null_R), np.std(null_R)))
    return found


def partners(layer: int, reading: LayerReading) -> list[AnalysisValue]:
    """Each expert's most frequent partner, against random pairs (k-1)/(E-1); nothing for K = 1."""
    num_experts, (num_tokens, top_k) = reading.probs_TE.shape[1], reading.ids_TK.shape
    if top_k < 2 or top_k == num_experts:
        return []
    counts_EE = coactivation.coactivation_counts(reading.ids_TK, num_experts)
    share_EE = coactivation.coactivation(counts_EE)
    null = coactivation.coactivation_null(top_k, num_experts)
    lift_EE = coactivation.coactivation_lift(counts_EE, num_tokens)
    beyond_EE = coactivation.coactivation_norm(share_EE, top_k)
    found = [
        layer_value(layer, "coact_lift_max", np.nanmax(lift_EE)),
        layer_value(layer, "coact_norm_max", np.nanmax(beyond_EE)),
    ]
    for expert in np.flatnonzero(np.diag(counts_EE)):
        best = int(np.nanargmax(share_EE[expert]))
        sd = np.sqrt(null * (1 - null) / counts_EE[expert, expert])
        found.append(expert_value(layer, expert, "coact", share_EE[expert, best], null, sd, f"expert {best}"))
    return found


def loads(layer: int, reading: LayerReading) -> list[AnalysisValue]:
    """Share of assignments of every expert; the even share is the null, with the spread of independent tokens."""
    num_experts = reading.probs_TE.shape[1]
    counts_E = np.bincount(reading.ids_TK.ravel(), minlength=num_experts)
    even = 1 / num_experts
    sd = float(np.sqrt(even * (1 - even) / counts_E.sum()))
    share_E = counts_E / counts_E.sum()
    found = [expert_value(layer, expert, "share", share_E[expert], even, sd) for expert in range(num_experts)]
    return [layer_value(layer, "load_entropy", float(load.load_entropy(share_E))), *found]


def alike(layer: int, reading: LayerReading, router_ED: np.ndarray | None) -> list[AnalysisValue]:
    """Similarity of the router's rows, and spread of the hidden states around their expert's centroid."""
    found = []
    if router_ED is not None:
        pairs = similarity.off_diagonal(similarity.cosines(router_ED))
        found += [
            layer_value(layer, "router_cos", pairs.mean),
            layer_value(layer, "router_cos_max", pairs.max),
            layer_value(layer, "router_orth", router_orth(router_ED)),
        ]
    if reading.inputs_TD is not None:
        hidden_TD = reading.inputs_TD.double().cpu().numpy()
        scatter = similarity.representation_collapse(hidden_TD, reading.ids_TK[:, 0])
        if np.isfinite(scatter.rc):  # else all tokens have one first choice
            found += [layer_value(layer, "rc", scatter.rc), layer_value(layer, "rc_ratio", scatter.ratio)]
    return found


def journeys(readings: Sequence[LayerReading]) -> list[AnalysisValue]:
    """How much a first choice tells about the next layer's, and how many paths tokens take through all layers."""
    found = []
    for layer in range(len(readings) - 1):
        here_T, next_T = readings[layer].ids_TK[:, 0], readings[layer + 1].ids_TK[:, 0]
        num_next = readings[layer + 1].probs_TE.shape[1]
        known = information(here_T, next_T, num_next, rounds=ROUNDS)
        table_EF = contingency(here_T, next_T, num_next)
        found += [
            layer_value(layer, "mi_layer", known.plugin, known.null_mean, known.null_sd),
            layer_value(layer, "u_layer", known.coefficient),
            layer_value(layer, "cond_entropy_layer", conditional_entropy(table_EF), known.expert_nats),
        ]
    taken = paths.paths(np.stack([reading.ids_TK[:, 0] for reading in readings]))
    whole = {
        "path_count": taken.distinct,
        "path_entropy": taken.entropy_nats,
        "path_effective": taken.effective,
    }
    return found + [
        AnalysisValue(part="run", layer=-1, index=-1, name=name, value=float(value))
        for name, value in {**whole, "tokens": taken.tokens}.items()
    ]
