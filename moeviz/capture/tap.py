"""The side of the probe that the model calls: hooks into slots, slots into sums, one forward at a time.

A pre-hook on the root opens a micro-batch and wakes the hooks; a hook on the root collects and puts them to
sleep. So several forwards make one step, a recomputation never counts, and evaluation passes leave no trace.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from moeviz.capture.attention import block_maps, choose_heads, select
from moeviz.capture.collect import Collector
from moeviz.capture.failures import ProbeError
from moeviz.capture.hooks import (
    CompiledCheckpointing,
    CoreSlot,
    RouterSlot,
    Switch,
    forget_graphs,
    hook_core,
    hook_root,
    hook_router,
    in_backward,
)
from moeviz.capture.latent_tap import LatentTap
from moeviz.capture.layer_groups import group_layers
from moeviz.capture.micro_batch import MicroBatch, parameter_names, read_call
from moeviz.capture.reading import AttentionCall, Handle, Observe, ReadRouter
from moeviz.capture.samples import Sampler, StepSamples
from moeviz.capture.sites import Sites
from moeviz.capture.step_sums import StepSums
from moeviz.policy import SamplingPolicy

When = Literal["training", "always"]
"""When hooks are awake: in forwards of the root in train mode with gradients on, or in every forward."""

_ATTENTION_SEQUENCES = 2
"""Sequences per training step whose maps are recorded: maps are large, and a reader looks at one."""
_HELD_ELEMENTS = 2**26
"""Logits that wait for the end of a forward at most (256 MB in float32); more are reduced at once."""


class OnError(Protocol):
    """Takes what went wrong inside a forward; `spoils`: the sums of the step are incomplete."""

    def __call__(self, where: str, error: Exception, *, name: str = "", spoils: bool = False) -> None: ...


class Tap:
    """Hooks on one model, and what they gathered since the last `take`."""

    def __init__(self, sites: Sites, policy: SamplingPolicy, when: When, on_error: OnError) -> None:
        self._root, self._routers, self._cores = sites.root, sites.routers, sites.cores
        self._attentions = sites.info.attentions
        self._switch = Switch()
        self._latents = LatentTap(sites, policy, self._switch, on_error)
        policy = self._latents.policy
        self._policy, self._when, self._on_error = policy, when, on_error
        self.collector = Collector(group_layers(sites.routers))
        self.sampler = Sampler(policy, _ATTENTION_SEQUENCES if when == "training" else sys.maxsize)
        self.step = 0
        """Number of the step in progress; decides what is sampled."""
        self.micro_batch: MicroBatch | None = None
        """The last one that was watched in this step."""
        self.paused = False
        """True while the fixed probe runs: its tokens are no part of any step."""
        self._router_slots = [RouterSlot() for _ in sites.routers]
        self._core_slots = [CoreSlot() for _ in sites.cores]
        self._handles: list[Handle] = []
        self.on_accelerator = False
        """Whether the routers decide on a device whose results are waited for."""
        self._filled = False
        """Whether slots may hold something: a forward that raised never came to empty them."""
        self._held = 0
        self.seconds = 0.0
        """Time that the hooks on the root took in the training thread, since the start."""
        self._names = parameter_names(sites.root)

    def attach(self) -> None:
        forget_graphs(self._root)
        self._handles += [CompiledCheckpointing(), *hook_root(self._root, self._begin, self._end)]
        for layer, site in enumerate(self._routers):
            guard = self._router_guard(layer, site.read)
            self._handles.append(hook_router(site, self._router_slots[layer], self._switch, guard))
        if self._policy.attention_every > 0 and self._policy.attention_heads > 0:
            for index, core in enumerate(self._cores):
                guard_core = self._core_guard(index)
                self._handles.append(
                    hook_core(
                        core, self._core_slots[index], self._switch, self._policy.attention_heads, guard_core
                    )
                )

        self._handles += self._latents.attach()

    def detach(self) -> None:
        """Remove every hook and let go of every tensor. The model is as it was."""
        self._sleep()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._clear_slots()

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def experts_choose(self, layer: int) -> bool:
        return self._routers[layer].experts_choose

    @property
    def map_size(self) -> int:
        return self._policy.attention_size

    def take(self) -> tuple[StepSums, StepSamples]:
        """What the step gathered, and a fresh start."""
        self._sleep()
        if self._filled:
            self._clear_slots()
        self.micro_batch = None
        return self.collector.take(), self.sampler.take()

    def take_sums(self, num_layers: int) -> StepSums | None:
        """`take` of a step without samples, all forwards of which came to their end; None where it was another.

        Args:
            num_layers: layers that such a step has seen.
        """
        sums = self.collector.step
        if self._filled or len(sums.layers_seen) != num_layers or not self.sampler.take_nothing():
            return None
        self.micro_batch = None
        return self.collector.take()

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        began = time.perf_counter()
        self._open(args, kwargs)
        self.seconds += time.perf_counter() - began

    def _open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._sleep()
        trains = self._root.training and torch.is_grad_enabled()
        if self.paused or in_backward() or not (trains or self._when == "always"):
            return
        try:
            if self._filled:
                self._clear_slots()
            self._filled = True
            index = 0 if self.micro_batch is None else self.micro_batch.index + 1
            self.micro_batch = micro_batch = _read_call(index, self._names, args, kwargs)
        except Exception as error:
            self._on_error("the start of a forward", error, spoils=True)
            return
        try:
            self.sampler.begin(micro_batch, self.step)
        except Exception as error:
            self._on_error("sampling", error)
        self._switch.rows_N = self.sampler.attention_rows_N
        self._switch.attending = self._switch.rows_N is not None
        self._switch.latent_rows_N = self.sampler.latent_rows_N
        self._switch.latents = self._switch.latent_rows_N is not None
        self._switch.awake = True

    def _end(self) -> None:
        if not self._switch.awake:
            return
        self._sleep()
        began = time.perf_counter()
        try:
            assert self.micro_batch is not None
            self.collector.count_tokens(self.micro_batch)  # now: a forward that raised leaves no trace
            self._collect()
        except Exception as error:
            self._on_error("reducing", error, spoils=True)
        for index, slot in enumerate(self._core_slots):
            if slot.call is not None:
                self._try_maps(index, slot.call)
        self._latents.collect(self.micro_batch, self.sampler)
        self._clear_slots()
        self.seconds += time.perf_counter() - began

    def _sleep(self) -> None:
        self._switch.awake = self._switch.attending = self._switch.latents = False

    def _clear_slots(self) -> None:
        self._filled, self._held = False, 0
        for slot in self._router_slots:
            slot.reading = None
        for core in self._core_slots:
            core.call = None
        self._latents.clear()

    def _collect(self) -> None:
        """Reduce what the router slots hold, and empty them."""
        assert self.micro_batch is not None
        readings = [slot.reading for slot in self._router_slots]
        for slot in self._router_slots:
            slot.reading = None
        self._held = 0
        held = next((reading for reading in readings if reading is not None), None)
        if held is not None:
            self.on_accelerator = not held.logits_TE.is_cpu
            self.collector.collect(self.micro_batch, readings, self.sampler.rows_N)

    def _router_guard(self, layer: int, read: ReadRouter) -> Callable[..., None]:
        slot = self._router_slots[layer]

        def guarded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            try:
                if in_backward():
                    return
                # A second call in one forward is a tiled layer or one that blocks share: both add up, and the
                # check of the first step tells them apart.
                if slot.reading is not None or self._held > _HELD_ELEMENTS:
                    self._collect()
                slot.reading = read(module, args, kwargs, output)
                self._held += slot.reading.logits_TE.numel()
            except Exception as error:
                self._on_error("router", error, name=self._routers[layer].name, spoils=True)

        return guarded

    def _core_guard(self, index: int) -> Observe:
        def guarded(call: AttentionCall) -> None:
            if not in_backward():
                self._try_maps(index, call)

        return guarded

    def _try_maps(self, index: int, call: AttentionCall) -> None:
        try:
            rows_N = self._switch.rows_N
            if rows_N is not None and not call.heads:
                heads = choose_heads(call.q_BHSD.shape[1], self._policy.attention_heads)
                call = select(call, rows_N, heads)
            self._keep_maps(index, call)
        except Exception as error:
            self._on_error("attention", error, name=self._cores[index].name)

    def _keep_maps(self, index: int, chosen: AttentionCall) -> None:
        """Compute the maps of a selected call; here, not in the writer, so that queries and keys are let go."""
        assert self.micro_batch is not None
        assert self._switch.rows_N is not None
        valid_NS = self.micro_batch.valid_BS
        rows_N: Tensor = self._switch.rows_N
        with torch.no_grad(), torch.autocast(chosen.q_BHSD.device.type, enabled=False):
            valid_NS = None if valid_NS is None else valid_NS.index_select(0, rows_N.to(valid_NS.device))
            maps = block_maps(chosen, valid_NS, self._policy.attention_size)
        layer, num_keys = self._attentions[index].layer, chosen.k_BGCD.shape[2]
        other = None if num_keys == chosen.q_BHSD.shape[2] else num_keys
        self.sampler.add_maps(self.micro_batch.index, layer, chosen.heads, maps, other)


def _read_call(
    index: int, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> MicroBatch:
    micro_batch = read_call(index, names, args, kwargs)
    if micro_batch is None:
        raise ProbeError(
            "no argument of the model looks like token ids [B, S]; call it with input_ids as its first "
            "argument or by keyword"
        )
    return micro_batch
