"""The same probe through several checkpoints of a run: what was decided when, and what still moves.

Every value is labelled with the other checkpoint. With two or more others whose steps are known, the curve of the last
fluctuation follows: the share of tokens whose first choice still changed at or after each of them.

Shapes: T tokens, E experts, K experts per token, C checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeviz.capture.reading import RouterSite
from moeviz.capture.sites import Sites, find_sites
from moeviz.errors import MoevizError
from moeviz.inspection.checkpoint import OpenedCheckpoint
from moeviz.inspection.expert_weights import moved
from moeviz.inspection.findings import layer_value
from moeviz.inspection.probe_batch import ProbeBatch
from moeviz.inspection.readings import LayerReading, ModelReading, read_model
from moeviz.metrics import change
from moeviz.records import AnalysisValue


def label_of(checkpoint: OpenedCheckpoint) -> str:
    """What a value about another checkpoint is labelled with."""
    return checkpoint.name if checkpoint.step is None else f"step {checkpoint.step}"


def over_checkpoints(
    checkpoint: OpenedCheckpoint,
    reading: ModelReading,
    sites: Sites,
    probe: ProbeBatch,
    others: Sequence[OpenedCheckpoint],
) -> list[AnalysisValue]:
    """Saturation, churn, drift and distance of weights to each of `others`, and the last fluctuation over them.

    Raises:
        MoevizError: a checkpoint of another shape or vocabulary.
    """
    found: list[AnalysisValue] = []
    firsts: list[tuple[int, list[np.ndarray]]] = []
    for other in others:
        there = _comparable(other, sites, probe)
        earlier = read_model(other.model.eval(), there.routers, probe.token_ids_NS, lambda: None)
        label = label_of(other)
        for layer, (one, before) in enumerate(zip(reading.layers, earlier.layers, strict=True)):
            found += changed(layer, one, before, label)
            routers: tuple[RouterSite, RouterSite] = (sites.routers[layer], there.routers[layer])
            found += moved(layer, one, before, routers, label)
        if other.step is not None:
            firsts.append((other.step, [each.ids_TK[:, 0] for each in earlier.layers]))
    if len(firsts) > 1 and checkpoint.step is not None:
        now = (checkpoint.step, [each.ids_TK[:, 0] for each in reading.layers])
        found += _fluctuation([*sorted(firsts, key=lambda each: each[0]), now])
    return found


def _comparable(other: OpenedCheckpoint, sites: Sites, probe: ProbeBatch) -> Sites:
    there = find_sites(other.model)
    shape = [[(each.num_experts, each.top_k) for each in found.routers] for found in (sites, there)]
    if shape[0] != shape[1]:
        raise MoevizError(
            f"{other.path} has layers of (experts, top-k) {shape[1]}, the checkpoint {shape[0]}; "
            "compare checkpoints of one run"
        )
    if int(probe.token_ids_NS.max()) >= len(other.token_texts):
        raise MoevizError(f"{other.path} has another vocabulary; compare checkpoints of one run")
    return there


def changed(layer: int, reading: LayerReading, other: LayerReading, label: str) -> list[AnalysisValue]:
    """This checkpoint's decisions against another one's on the same tokens."""
    top_k, num_experts = reading.ids_TK.shape[1], reading.probs_TE.shape[1]
    kept = float(change.saturation(other.ids_TK, reading.ids_TK))
    first = float(change.saturation(other.ids_TK[:, :1], reading.ids_TK[:, :1]))
    chance, tokens = top_k / num_experts, len(reading.ids_TK)
    sd = np.sqrt(chance * (1 - chance) / (tokens * top_k))
    adjusted = float(change.saturation_adj(kept, top_k, num_experts)) if top_k < num_experts else np.nan
    churn = change.churn(other.ids_TK, reading.ids_TK)
    drift = change.probe_drift(other.probs_TE, reading.probs_TE)
    return [
        layer_value(layer, "saturation", kept, chance, sd, label),
        layer_value(layer, "saturation_top1", first, 1 / num_experts, label=label),
        layer_value(layer, "saturation_adj", adjusted, 0.0, label=label),
        layer_value(layer, "churn", churn, 1 - chance, sd, label),
        layer_value(
            layer, "flip1", change.flip1(other.ids_TK, reading.ids_TK), 1 - 1 / num_experts, label=label
        ),
        layer_value(layer, "probe_drift", drift, label=label),
    ]


def _fluctuation(firsts: Sequence[tuple[int, list[np.ndarray]]]) -> list[AnalysisValue]:
    """Share of tokens whose first choice was not its final one at or after each checkpoint; the last one is final."""
    steps_C = np.array([step for step, _ in firsts])
    found = []
    for layer in range(len(firsts[0][1])):
        first_CT = np.stack([layers[layer] for _, layers in firsts])
        last_T = change.last_fluctuation(first_CT, steps_C)
        share_C = change.still_moving(last_T, steps_C[:-1])
        found += [
            layer_value(layer, "last_fluctuation", share, label=f"step {step}")
            for step, share in zip(steps_C[:-1], share_C, strict=True)
        ]
    return found
