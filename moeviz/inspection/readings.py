"""What a checkpoint does with a probe, as arrays: decisions, scores, losses, and what the experts were given.

Independent of the recording of a run, because a job needs what a run does not keep: scores of all experts, hidden
states, unrounded gate weights.

Shapes: N sequences of S tokens, T = N*S, E experts and K experts per token (of a layer), D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moeviz.capture.probe_readings import experts_beside
from moeviz.capture.reading import Reading, RouterSite
from moeviz.capture.reduce import scores_of, stack
from moeviz.inspection.trace import logits_of, next_token_loss

BATCH_TOKENS = 4096
"""Tokens of one forward pass at most."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerReading:
    """One MoE layer on the whole probe."""

    ids_TK: np.ndarray
    weights_TK: np.ndarray
    """float64."""
    probs_TE: np.ndarray
    """Normalised scores, float64."""
    logits_TE: np.ndarray
    """float64, without selection bias."""
    inputs_TD: Tensor | None
    """What the experts were given, on the model's device; None where the layer has no such module."""
    experts: nn.Module | None
    """Called as experts(x, ids, weights)."""
    dropped_E: np.ndarray | None = None
    """Assignments of each expert that a capacity limit dropped; None for a dropless layer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelReading:
    """A checkpoint on a probe."""

    layers: tuple[LayerReading, ...]
    loss_NS: np.ndarray
    """float64, nats, of predicting the next token: [N, S-1]."""
    predicted_NS: np.ndarray
    """The likeliest next token after every token, int64."""


@torch.no_grad()
def read_model(
    model: nn.Module, sites: tuple[RouterSite, ...], token_ids_NS: np.ndarray, tick: Callable[[], None]
) -> ModelReading:
    """Run the probe once in evaluation mode. `tick` is called after every batch."""
    with ExitStack() as hooks:
        taps = [hooks.enter_context(_tapped(model, site)) for site in sites]
        predicted: list[np.ndarray] = []
        loss_NS = losses(
            model,
            token_ids_NS,
            tick,
            look=lambda logits_BSV: predicted.append(logits_BSV.argmax(dim=-1).cpu().numpy()),
        )
    return ModelReading(
        layers=tuple(tap.read() for tap in taps), loss_NS=loss_NS, predicted_NS=np.concatenate(predicted)
    )


@torch.no_grad()
def losses(
    model: nn.Module,
    token_ids_NS: np.ndarray,
    tick: Callable[[], None] = lambda: None,
    before: Callable[[Tensor], None] = lambda ids: None,
    after: Callable[[Tensor], None] = lambda loss: None,
    look: Callable[[Tensor], None] = lambda logits: None,
) -> np.ndarray:
    """Loss of every next token, float64 [N, S-1].

    `before`, `look` and `after` see the ids, the logits and the losses of each batch.
    """
    parts = []
    for ids_BS in _batches(model, token_ids_NS):
        before(ids_BS)
        logits_BSV = logits_of(model(ids_BS))
        look(logits_BSV)
        loss_BS = next_token_loss(logits_BSV, ids_BS)
        after(loss_BS)
        parts.append(loss_BS.double().cpu().numpy())
        tick()
    return np.concatenate(parts)


@torch.enable_grad()
def losses_with_graph(model: nn.Module, token_ids_NS: np.ndarray) -> Iterator[Tensor]:
    """The part of each batch in the mean loss of the probe, with its graph: their sum is that mean."""
    predicted = token_ids_NS.shape[0] * (token_ids_NS.shape[1] - 1)
    for ids_BS in _batches(model, token_ids_NS):
        yield next_token_loss(logits_of(model(ids_BS)), ids_BS).sum() / predicted


def _batches(model: nn.Module, token_ids_NS: np.ndarray) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    rows = max(1, BATCH_TOKENS // token_ids_NS.shape[1])
    for first in range(0, len(token_ids_NS), rows):
        yield torch.from_numpy(token_ids_NS[first : first + rows]).to(device)


class _Tap:
    """Gathers what one router and its experts saw."""

    def __init__(self, site: RouterSite, experts: nn.Module | None) -> None:
        self._site, self._experts = site, experts
        self._readings: list[Reading] = []
        self._inputs: list[Tensor] = []

    def router(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._readings.append(self._site.read(module, args, kwargs, output))

    def expert_inputs(self, module: nn.Module, args: Any) -> None:
        self._inputs.append(args[0].detach().reshape(-1, args[0].shape[-1]))

    def read(self) -> LayerReading:
        decisions = [stack([reading]) for reading in self._readings]
        score = self._site.score
        probs = [scores_of(each.logits_LTE, score).probs_LTE[0] for each in decisions]
        dropped = [each.dropped_LTK for each in decisions if each.dropped_LTK is not None]
        ids_TK = _array([each.expert_ids_LTK[0] for each in decisions]).astype(np.int64)
        lost_E = None
        if dropped:
            lost_TK = _array([each[0] for each in dropped]) > 0
            lost_E = np.bincount(ids_TK[lost_TK], minlength=self._site.num_experts)
        return LayerReading(
            ids_TK=ids_TK,
            weights_TK=_array([each.weights_LTK[0] for each in decisions]),
            probs_TE=_array(probs),
            logits_TE=_array([each.logits[0].float() for each in decisions]),
            dropped_E=lost_E,
            inputs_TD=torch.cat(self._inputs) if self._inputs else None,
            experts=self._experts,
        )


@contextmanager
def _tapped(model: nn.Module, site: RouterSite) -> Iterator[_Tap]:
    experts = experts_beside(model, site)
    tap = _Tap(site, experts)
    handles = [site.module.register_forward_hook(tap.router, with_kwargs=True)]
    if experts is not None:
        handles.append(experts.register_forward_pre_hook(tap.expert_inputs))
    try:
        yield tap
    finally:
        for handle in handles:
            handle.remove()


def _array(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).double().cpu().numpy()
