"""The part of the tap that watches latents: which layers, and what is kept of them after a forward.

What goes wrong here is told to the probe and costs the pictures of a step, never its loads and never training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from moeviz.capture.hooks import Switch
from moeviz.capture.latent_batch import LatentPiece
from moeviz.capture.latent_sites import LatentSite, spread
from moeviz.capture.latents import (
    LatentSlot,
    Stages,
    hook_latents,
    reads_of,
    show_tokens,
    stage_weights,
    take_tokens,
)
from moeviz.capture.micro_batch import MicroBatch
from moeviz.capture.reading import Handle
from moeviz.capture.samples import Sampler
from moeviz.capture.sites import Sites
from moeviz.policy import SamplingPolicy


class OnError(Protocol):
    """Takes what went wrong at a module."""

    def __call__(self, where: str, error: Exception, *, name: str = "") -> None: ...


class _Layer(NamedTuple):
    site: LatentSite
    block: int
    slot: LatentSlot


class LatentTap:
    """Hooks on the attention layers whose latents are recorded."""

    def __init__(self, sites: Sites, policy: SamplingPolicy, switch: Switch, on_error: OnError) -> None:
        self._switch, self._on_error = switch, on_error
        self._layers = [
            _Layer(sites.latents[at], sites.info.latents[at].layer, LatentSlot())
            for at in spread(len(sites.latents), policy.latent_layers)
        ]
        self.policy = policy if self._layers else replace(policy, latent_every=0)
        """Without latents no sequence is chosen for them either."""

    def attach(self) -> list[Handle]:
        if self.policy.latent_every == 0:
            return []
        return [
            handle
            for layer in self._layers
            for handle in hook_latents(layer.site, layer.slot, self._switch, self._failure(layer))
        ]

    def clear(self) -> None:
        """Let go of every tensor."""
        for layer in self._layers:
            layer.slot.clear()

    def collect(self, micro_batch: MicroBatch | None, sampler: Sampler) -> None:
        """Compute what the slots hold after a forward, and hand it to the sampler."""
        if micro_batch is None or self._switch.latent_rows_N is None:
            return
        for layer in self._layers:
            try:
                self._collect(layer, micro_batch, sampler, self._switch.latent_rows_N)
            except Exception as error:
                self._failure(layer)(error)

    def _failure(self, layer: _Layer) -> Callable[[Exception], None]:
        return lambda error: self._on_error("latents", error, name=layer.site.name)

    def _collect(self, layer: _Layer, micro_batch: MicroBatch, sampler: Sampler, rows_N: Tensor) -> None:
        stages = layer.slot.stages
        with torch.no_grad():
            for name, latents_BSR in layer.slot.latents.items():
                with torch.autocast(latents_BSR.device.type, enabled=False):
                    kind: Literal["kv", "q"] = "kv" if name == "kv" else "q"
                    self._keep_tokens(layer, kind, latents_BSR, micro_batch, sampler, rows_N)
            if stages is not None and stages.call is not None:
                with torch.autocast(stages.k_NGSD.device.type, enabled=False):
                    self._keep_stages(layer, stages, micro_batch, sampler)

    def _keep_tokens(
        self,
        layer: _Layer,
        kind: Literal["kv", "q"],
        latents_BSR: Tensor,
        micro_batch: MicroBatch,
        sampler: Sampler,
        rows_N: Tensor,
    ) -> None:
        room = sampler.latent_room(layer.block, kind)
        if room <= 0 or latents_BSR.shape[:2] != (micro_batch.batch_size, micro_batch.length):
            return
        tensors = take_tokens(latents_BSR, micro_batch.valid_BS, room)
        if room == self.policy.latent_tokens:  # the first of the step is the one that is shown
            tensors["shown"] = show_tokens(latents_BSR, rows_N)
            tensors |= reads_of(layer.site.module) if kind == "kv" else {}
        sampler.add_latents(LatentPiece(layer.block, kind, micro_batch.index), tensors)

    def _keep_stages(self, layer: _Layer, stages: Stages, micro_batch: MicroBatch, sampler: Sampler) -> None:
        assert stages.call is not None
        chunk: int = layer.site.module.get_submodule("core").chunk  # type: ignore[assignment]
        piece = LatentPiece(
            layer.block,
            "slots",
            micro_batch.index,
            stages.call.heads,
            max(1, layer.site.num_heads // stages.latents_GMD.shape[0]),
            chunk,
        )
        sampler.add_latents(piece, stage_weights(stages, chunk, layer.site.width))
