"""From passes over the fixed probe to numbers: what changed since the last pass, and what experts know about domains.

Only consecutive passes of one probe are compared: other tokens would differ because of the data. Saturation needs the
newest pass, which is not known while a run goes on, so readers compute it (`store.queries.probe_saturation`).

Shapes: L layers of the model, N sequences, T valid tokens, K experts per token, E experts, D domains.
"""

from __future__ import annotations

import numpy as np

from moeviz.metrics import change, specialization
from moeviz.records import MetricRecord, ModelInfo, ProbeRecord

ROUNDS = 20
"""Permutations of the null of `nmi_domain`."""
ATTENTION_COLLAPSED = "attn_collapsed"
"""Share of the heads whose entropy is below the line of the rule."""


class ProbeHistory:
    """The last pass of a run, and what the next one is compared with."""

    def __init__(self, info: ModelInfo, collapsed_entropy: float) -> None:
        """`collapsed_entropy`: `attn_entropy` below which a head counts as collapsed."""
        self._info, self._collapsed_entropy = info, collapsed_entropy
        self.restart()

    def restart(self) -> None:
        """Forget the last pass."""
        self._tokens: tuple[bytes, tuple[str | None, ...]] | None = None
        self._ids: dict[int, np.ndarray] = {}

    def observe(self, record: ProbeRecord) -> MetricRecord:
        """Metrics of one pass: per layer [L], NaN where they are not defined, and run-level numbers."""
        tokens = (record.sequences.token_ids_NS.tobytes(), record.sequences.domains)
        if tokens != self._tokens:
            self.restart()
            self._tokens = tokens
        ids = layer_decisions(record)
        values: dict[str, np.ndarray | float] = {
            name: np.asarray(value_L, dtype=np.float64) for name, value_L in record.layer_values.items()
        }
        for layer, ids_TK in ids.items():
            found = self._of_layer(layer, ids_TK, record)
            for name, value in found.items():
                known = values.setdefault(name, np.full(self._info.num_layers, np.nan))
                assert isinstance(known, np.ndarray)
                known[layer] = value
        self._ids = ids
        values |= self._heads(record)
        return MetricRecord(
            step=record.step,
            values={name: value for name, value in values.items() if np.isfinite(value).any()},
        )

    def _of_layer(self, layer: int, ids_TK: np.ndarray, record: ProbeRecord) -> dict[str, float]:
        found = {}
        before_TK = self._ids.get(layer)
        if before_TK is not None and before_TK.shape == ids_TK.shape:
            found["churn"] = float(change.churn(before_TK, ids_TK))
            found["flip1"] = float(change.flip1(before_TK, ids_TK))
        counts_DE, counts_NE, domain_N = domain_counts(
            ids_TK, record.sequences.lengths_N, record.sequences.domains, self._info.layers[layer].num_experts
        )
        if len(domain_N) and min(np.bincount(domain_N)) > 1 and len(counts_DE) > 1:
            mean, sd = nmi_null(counts_NE, domain_N)
            found["nmi_domain"] = specialization.nmi_domain(counts_DE)
            found["nmi_domain/null_mean"], found["nmi_domain/null_sd"] = mean, sd
        return found

    def _heads(self, record: ProbeRecord) -> dict[str, np.ndarray | float]:
        """`attn_entropy` of the blocks that hold an MoE layer, mean over heads, and the share of collapsed heads."""
        if not record.head_entropy:
            return {}
        entropy_L = [
            float(np.mean(record.head_entropy[layer.block])) if layer.block in record.head_entropy else np.nan
            for layer in self._info.layers
        ]
        heads = np.concatenate([np.ravel(entropy_H) for entropy_H in record.head_entropy.values()])
        collapsed = float((heads < self._collapsed_entropy).mean())
        return {"attn_entropy": np.array(entropy_L), ATTENTION_COLLAPSED: collapsed}


def layer_decisions(record: ProbeRecord) -> dict[int, np.ndarray]:
    """MoE layer -> experts of the valid tokens of all sequences, one after the other, [T, K]."""
    found = {}
    for routing in record.routings:
        valid_NS = np.arange(routing.experts_LNSK.shape[2]) < np.asarray(routing.lengths_N)[:, None]
        for layer, experts_NSK in zip(routing.layers, routing.experts_LNSK, strict=True):
            found[int(layer)] = experts_NSK[valid_NS]
    return found


def domain_counts(
    ids_TK: np.ndarray, lengths_N: np.ndarray, domains: tuple[str | None, ...], num_experts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Assignments by domain and by sequence; sequences without a domain are left out.

    Returns: counts [D, E] in the order of first appearance, counts [N', E] of labelled sequences, their domain [N'].
    """
    names = [name for name in dict.fromkeys(domains) if name is not None]
    sequence_T = np.repeat(np.arange(len(domains)), lengths_N)
    cells_TK = sequence_T[:, None] * num_experts + ids_TK
    counts_NE = np.bincount(cells_TK.ravel(), minlength=len(domains) * num_experts)
    counts_NE = counts_NE.reshape(len(domains), num_experts)
    labelled_N = [n for n, name in enumerate(domains) if name is not None]
    domain_N = np.array([names.index(str(domains[n])) for n in labelled_N], dtype=np.int64)
    counts_NE = counts_NE[labelled_N]
    return np.eye(len(names), dtype=np.int64)[:, domain_N] @ counts_NE, counts_NE, domain_N


def nmi_null(counts_NE: np.ndarray, domain_N: np.ndarray, rounds: int = ROUNDS) -> tuple[float, float]:
    """Mean and standard deviation of `nmi_domain` when labels move between whole sequences."""
    rng = np.random.default_rng(0)
    member_DN = np.eye(int(domain_N.max()) + 1, dtype=np.int64)
    null_R = [
        specialization.nmi_domain(member_DN[:, rng.permutation(domain_N)] @ counts_NE) for _ in range(rounds)
    ]
    return float(np.mean(null_R)), float(np.std(null_R))
