"""Experts as weights: how alike, how large, how far they moved since another checkpoint, what gradient they get.

Only experts that keep their weights stacked, `[E, ...]` in each parameter, are looked at: moeviz's own models and those
of `transformers` since version 5.

Shapes: E experts, D width, N sequences of S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from moeviz.capture.reading import RouterSite
from moeviz.inspection.findings import expert_value, layer_value
from moeviz.inspection.readings import LayerReading, losses_with_graph
from moeviz.metrics import decision, gradients, similarity
from moeviz.records import AnalysisValue

_COLUMNS = 2**20
"""Numbers of an expert that are looked at together."""


def router_rows(site: RouterSite) -> np.ndarray | None:
    """The router's weight, one row per expert; None where it has no such matrix."""
    weight = getattr(site.module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or len(weight) != site.num_experts:
        return None
    return weight.detach().double().cpu().numpy()


def stacked(experts: nn.Module | None, num_experts: int) -> tuple[Tensor, ...]:
    """Parameters with a slice for each expert; empty where the layer does not keep them so."""
    if experts is None:
        return ()
    return tuple(each for each in experts.parameters() if each.ndim > 1 and len(each) == num_experts)


def weights_apart(layer: int, reading: LayerReading) -> list[AnalysisValue]:
    """`expert_w_cos`, mean and largest of two experts, and the norm of each expert's weights."""
    gram_EE = _gram(stacked(reading.experts, reading.probs_TE.shape[1]))
    if gram_EE is None:
        return []
    norm_E = np.sqrt(np.diag(gram_EE))
    found = [expert_value(layer, at, "expert_w_norm", norm) for at, norm in enumerate(norm_E)]
    if len(norm_E) > 1 and norm_E.min() > 0:
        pairs = similarity.off_diagonal(gram_EE / np.outer(norm_E, norm_E))
        found.append(layer_value(layer, "expert_w_cos", pairs.mean, 0.0))
        found.append(layer_value(layer, "expert_w_cos_max", pairs.max))
    return found


def moved(
    layer: int, reading: LayerReading, before: LayerReading, sites: Sequence[RouterSite], label: str
) -> list[AnalysisValue]:
    """How far router and experts moved since another checkpoint, relative to their size then.

    Args:
        sites: the layer's router now and then.
        label: what the other checkpoint is called.
    """
    found = []
    now_ED, then_ED = (router_rows(site) for site in sites)
    if now_ED is not None and then_ED is not None:
        ratio = decision.router_update_ratio(then_ED, now_ED)
        found.append(layer_value(layer, "router_update_ratio", ratio, label=label))
    num_experts = reading.probs_TE.shape[1]
    pairs = list(
        zip(stacked(reading.experts, num_experts), stacked(before.experts, num_experts), strict=False)
    )
    if pairs:
        steps = [_squares(now.detach() - then.detach().to(now)) for now, then in pairs]
        sizes = [_squares(then.detach()) for _, then in pairs]
        step_E, size_E = np.sqrt(np.sum(steps, axis=0)), np.sqrt(np.sum(sizes, axis=0))
        ratio_E = gradients.update_ratio(step_E, size_E)
        found += [
            expert_value(layer, at, "update_ratio", ratio, label=label) for at, ratio in enumerate(ratio_E)
        ]
    return found


def gradient_norms(
    model: nn.Module, readings: Sequence[LayerReading], token_ids_NS: np.ndarray
) -> list[AnalysisValue]:
    """Gradient of the probe's mean loss at each expert's weights, and per assignment. One backward pass.

    Weights and their `.grad` stay as they are. An expert that gets no token has a gradient of exactly 0.
    """
    parts = [stacked(each.experts, each.probs_TE.shape[1]) for each in readings]
    wanted = [weight for weights in parts for weight in weights]
    if not wanted:
        return []
    asked = [weight.requires_grad for weight in wanted]
    sums: list[Tensor | None] = [None] * len(wanted)
    try:
        for weight in wanted:
            weight.requires_grad_(True)
        for loss in losses_with_graph(model, token_ids_NS):
            grads = torch.autograd.grad(loss, wanted, allow_unused=True)
            sums = [
                total if grad is None else grad.float() if total is None else total.add_(grad)
                for total, grad in zip(sums, grads, strict=True)
            ]
    finally:
        for weight, was in zip(wanted, asked, strict=True):
            weight.requires_grad_(was)
    found: list[AnalysisValue] = []
    at = 0
    for layer, (reading, weights) in enumerate(zip(readings, parts, strict=True)):
        mine = [each for each in sums[at : at + len(weights)] if each is not None]
        at += len(weights)
        if mine:
            norm_E = np.sqrt(np.sum([_squares(each) for each in mine], axis=0))
            counts_E = np.bincount(reading.ids_TK.ravel(), minlength=len(norm_E))
            each_E = gradients.grad_per_token(norm_E, counts_E)
            for name, values_E in (("grad_norm_expert", norm_E), ("grad_per_token", each_E)):
                found += [expert_value(layer, expert, name, value) for expert, value in enumerate(values_E)]
    return found


def _squares(weights: Tensor) -> np.ndarray:
    """Sum of squares of each expert, float64 [E]."""
    total_E = torch.zeros(len(weights), dtype=torch.float64)
    for part in _columns(weights):
        total_E += part.double().square().sum(dim=1).cpu()
    return total_E.numpy()


def _gram(weights: Sequence[Tensor]) -> np.ndarray | None:
    """Inner products of the experts' flattened weights, float64 [E, E]."""
    if not weights:
        return None
    total_EE = torch.zeros(len(weights[0]), len(weights[0]), dtype=torch.float64)
    for each in weights:
        for part in _columns(each.detach()):
            rows = part.double()
            total_EE += (rows @ rows.T).cpu()
    return total_EE.numpy()


def _columns(weights: Tensor) -> Iterator[Tensor]:
    flat = weights.reshape(len(weights), -1)
    for first in range(0, flat.shape[1], _COLUMNS):
        yield flat[:, first : first + _COLUMNS]
