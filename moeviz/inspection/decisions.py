"""How decided the routers are about a probe, and every library's balance loss on it: values per layer.

What a training step records anyway (entropy, confidence, selection margin, z-loss ...) is in the `metrics` table of the
analysis; here is what needs all scores of all tokens. The null of a loss is its value at perfect balance.

Shapes: N sequences of S tokens, T = N*S, L layers, E experts, K experts per token, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeviz.inspection.findings import layer_value
from moeviz.inspection.probe_batch import ProbeBatch
from moeviz.inspection.readings import LayerReading
from moeviz.metrics import capacity, decision, load, losses
from moeviz.records import AnalysisValue


def decisions(layer: int, reading: LayerReading, router_ED: np.ndarray | None) -> list[AnalysisValue]:
    """Margins, effective experts per token, score mass, and the size of logits and router."""
    num_tokens, top_k = reading.ids_TK.shape
    num_experts = reading.probs_TE.shape[1]
    weighed_T = reading.weights_TK.sum(axis=1) > 0
    found = [
        layer_value(layer, "gate_mass", decision.gate_mass(reading.probs_TE, top_k), top_k / num_experts),
        layer_value(layer, "logit_rms", decision.logit_rms(reading.logits_TE)),
        layer_value(layer, "logit_max", decision.logit_max(reading.logits_TE)),
        layer_value(layer, "lse_mean", decision.lse_mean(reading.logits_TE)),
        layer_value(layer, "token_drop", 1 - weighed_T.sum() / num_tokens),
    ]
    if num_experts > 1:
        found.append(layer_value(layer, "margin12", decision.margin12(reading.probs_TE)))
        found.append(layer_value(layer, "margin12_logits", decision.margin12(reading.logits_TE)))
    if weighed_T.any():
        found.append(layer_value(layer, "gate_eff", decision.gate_eff(reading.weights_TK[weighed_T])))
    if reading.dropped_E is not None:
        counts_E = np.bincount(reading.ids_TK.ravel(), minlength=num_experts)
        slots = int((counts_E - reading.dropped_E).max())
        found.append(layer_value(layer, "overflow_max", capacity.overflow(counts_E, slots).max()))
    if router_ED is not None:
        found.append(layer_value(layer, "router_norm", decision.router_norm(router_ED)))
    return found


def balance_losses(layer: int, reading: LayerReading, probe: ProbeBatch) -> list[AnalysisValue]:
    """The sequence-wise loss, GShard's with a group per sequence, and the chi-square of the load."""
    top_k, num_experts = reading.ids_TK.shape[1], reading.probs_TE.shape[1]
    shape = probe.token_ids_NS.shape
    ids_NSK, probs_NSE = reading.ids_TK.reshape(*shape, -1), reading.probs_TE.reshape(*shape, -1)
    first_NE = np.stack([np.bincount(ids_SK[:, 0], minlength=num_experts) for ids_SK in ids_NSK])
    gshard = losses.aux_gshard(first_NE, probs_NSE.mean(axis=1)).mean()
    counts_E = np.bincount(reading.ids_TK.ravel(), minlength=num_experts)
    found = [
        layer_value(layer, "aux_seq", losses.aux_seq(ids_NSK, probs_NSE), 1.0),
        layer_value(layer, "aux_gshard", gshard, 1 / num_experts**2),
    ]
    if num_experts > top_k:
        free, steps = num_experts - top_k, num_experts - 1
        spread = np.sqrt(2 * steps) * free / steps
        found.append(layer_value(layer, "load_chi2", load.load_chi2(counts_E), free, spread))
    return found


def pooled_loss(readings: Sequence[LayerReading]) -> list[AnalysisValue]:
    """The loss that pools all layers before it multiplies; nothing where layers differ in E or K."""
    shapes = {(reading.probs_TE.shape[1], reading.ids_TK.shape[1]) for reading in readings}
    if len(shapes) != 1:
        return []
    ((num_experts, top_k),) = shapes
    share_LE = load.load_share(
        np.stack([np.bincount(reading.ids_TK.ravel(), minlength=num_experts) for reading in readings])
    )
    prob_LE = np.stack([reading.probs_TE.mean(axis=0) for reading in readings])
    value = losses.aux_hf(share_LE, prob_LE, top_k)
    return [AnalysisValue(part="run", layer=-1, index=-1, name="aux_hf", value=value, null_mean=float(top_k))]
