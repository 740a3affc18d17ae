"""What needs the experts themselves: their outputs apart, what they add, and what the model loses without each.

Shapes: T tokens, E experts, K experts per token, D width, N sequences of S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from moeviz.capture.reading import RouterSite
from moeviz.inspection.findings import expert_value, layer_value
from moeviz.inspection.probe_batch import ProbeBatch
from moeviz.inspection.readings import LayerReading, expert_output, losses
from moeviz.inspection.removal import without_expert
from moeviz.metrics import importance, similarity
from moeviz.metrics.importance import Removal
from moeviz.records import AnalysisValue

PES_TOKENS = 256
"""Tokens that all experts of a layer are run on: E forward passes of one layer."""
ALL = "all"
"""Label of a knock-out over the whole probe."""


def outputs_apart(layer: int, reading: LayerReading) -> list[AnalysisValue]:
    """`reap` of every expert and `pes` of the layer; nothing where experts cannot be called on their own."""
    if reading.experts is None or reading.inputs_TD is None:
        return []
    num_tokens, top_k = reading.ids_TK.shape
    num_experts = reading.probs_TE.shape[1]
    norms_TK = np.stack(
        [
            expert_output(reading, torch.from_numpy(reading.ids_TK[:, slot]))
            .double()
            .norm(dim=-1)
            .cpu()
            .numpy()
            for slot in range(top_k)
        ],
        axis=1,
    )
    saliency_E = importance.reap(reading.weights_TK, reading.ids_TK, norms_TK, num_experts)
    some = slice(0, num_tokens, max(1, num_tokens // PES_TOKENS))
    size = len(range(*some.indices(num_tokens)))
    outputs_TED = torch.stack(
        [expert_output(reading, torch.full((size,), expert), some) for expert in range(num_experts)], dim=1
    )
    found = [
        expert_value(layer, at, "reap", each) for at, each in enumerate(saliency_E) if not np.isnan(each)
    ]
    return [layer_value(layer, "pes", similarity.pes(outputs_TED.double().cpu().numpy())), *found]


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
