"""What needs the experts themselves: their outputs apart, what they add, and what the model loses without each.

Shapes: T tokens, E experts, K experts per token, D width, N sequences of S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from moeviz.capture.reading import RouterSite
from moeviz.inspection.expert_answers import expert_answer
from moeviz.inspection.findings import ROUNDS, expert_value, layer_value
from moeviz.inspection.probe_batch import ProbeBatch
from moeviz.inspection.readings import LayerReading, losses
from moeviz.inspection.removal import without_expert
from moeviz.metrics import importance, similarity
from moeviz.metrics.importance import Removal
from moeviz.records import AnalysisValue

PES_TOKENS = 256
"""Tokens that all experts of a layer are run on: E forward passes of one layer."""
CKA_ROUNDS = 5
"""Permutations of the null of CKA, each as dear as the value."""
ALL = "all"
"""Label of a knock-out over the whole probe."""


def outputs_apart(layer: int, reading: LayerReading) -> list[AnalysisValue]:
    """What experts make of the same tokens: `pes`, CKA, the coupling to the router, and `reap` of every expert.

    Nothing where experts cannot be called on their own.
    """
    if reading.experts is None or reading.inputs_TD is None:
        return []
    num_tokens, num_experts = reading.probs_TE.shape
    some = slice(0, num_tokens, max(1, num_tokens // PES_TOKENS))
    size = len(range(*some.indices(num_tokens)))
    answers = [expert_answer(reading, torch.full((size,), expert), some) for expert in range(num_experts)]
    outputs_ETD = torch.stack([each.outputs_TD for each in answers]).double().cpu().numpy()
    found = [layer_value(layer, "pes", similarity.pes(outputs_ETD.transpose(1, 0, 2)), 0.0)]
    if num_experts > 1:
        found += _cka(layer, outputs_ETD)
    norms = [each.hidden_norm_T for each in answers]
    if all(norm is not None for norm in norms):
        norms_TE = np.stack([norm.double().cpu().numpy() for norm in norms if norm is not None], axis=1)
        found.append(_coupling(layer, reading.probs_TE[some], norms_TE))
    return found + _saliency(layer, reading)


def _cka(layer: int, outputs_ETD: np.ndarray) -> list[AnalysisValue]:
    """Mean and largest CKA of two experts, against experts that saw the tokens in another order."""
    pairs = similarity.off_diagonal(similarity.cka_matrix(outputs_ETD))
    rng = np.random.default_rng(0)
    null_R = [
        similarity.off_diagonal(
            similarity.cka_matrix(np.stack([rng.permutation(each_TD) for each_TD in outputs_ETD]))
        ).mean
        for _ in range(CKA_ROUNDS)
    ]
    return [
        layer_value(layer, "linear_cka", pairs.mean, np.mean(null_R), np.std(null_R)),
        layer_value(layer, "linear_cka_max", pairs.max),
    ]


def _coupling(layer: int, scores_TE: np.ndarray, norms_TE: np.ndarray) -> AnalysisValue:
    """`coupling` against scores that stay with their token but go to other experts."""
    rng = np.random.default_rng(0)
    null_R = [similarity.coupling(rng.permuted(scores_TE, axis=1), norms_TE) for _ in range(ROUNDS)]
    value = similarity.coupling(scores_TE, norms_TE)
    return layer_value(layer, "coupling", value, np.mean(null_R), np.std(null_R))


def _saliency(layer: int, reading: LayerReading) -> list[AnalysisValue]:
    norms_TK = np.stack(
        [
            expert_answer(reading, torch.from_numpy(reading.ids_TK[:, slot]))
            .outputs_TD.double()
            .norm(dim=-1)
            .cpu()
            .numpy()
            for slot in range(reading.ids_TK.shape[1])
        ],
        axis=1,
    )
    saliency_E = importance.reap(reading.weights_TK, reading.ids_TK, norms_TK, reading.probs_TE.shape[1])
    return [expert_value(layer, at, "reap", each) for at, each in enumerate(saliency_E) if not np.isnan(each)]


def knockouts(
    model: nn.Module,
    site: RouterSite,
    layer: int,
    probe: ProbeBatch,
    base_loss_NS: np.ndarray,
    modes: Sequence[Removal],
    tick: Callable[[], None],
) -> list[AnalysisValue]:
    """Change of the loss without each expert of a layer, on the whole probe and on each domain, nats per token.

    The null is 0 with the paired standard error, widened by how much tokens of a sequence depend on each other.
    """
    found = []
    domains = np.array(probe.domains)
    wholes: list[tuple[str, np.ndarray]] = [(ALL, np.ones(len(domains), dtype=bool))]
    wholes += [(name, domains == name) for name in probe.names]
    for mode in modes:
        if mode == "reroute" and site.top_k >= site.num_experts:
            continue
        for expert in range(site.num_experts):
            with without_expert(site, expert, mode), torch.no_grad():
                loss_NS = losses(model, probe.token_ids_NS)
            tick()
            for label, rows_N in wholes:
                effect = _effect(base_loss_NS[rows_N], loss_NS[rows_N], mode)
                found.append(
                    expert_value(
                        layer, expert, f"knockout_{mode}", effect.delta, 0.0, effect.standard_error, label
                    )
                )
    return found


def _effect(base_NS: np.ndarray, without_NS: np.ndarray, mode: Removal) -> importance.Knockout:
    sequences_NS = np.broadcast_to(np.arange(len(base_NS))[:, None], base_NS.shape)
    design = importance.design_effect_of((without_NS - base_NS).ravel(), sequences_NS.ravel())
    return importance.knockout(base_NS.ravel(), without_NS.ravel(), mode, design)
