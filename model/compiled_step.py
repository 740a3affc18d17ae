"""One token's step compiled: for a single row of numbers, what surrounds the products costs as much as they do.

A compiled program knows shapes, so the cache is read whole and where a token stands is data: slots behind it are
masked. Blocks of one kind share their part of the program, whatever their number, which keeps compiling at half a
minute.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from model.block import BlockOutput
from model.config import ModelConfig
from model.few_rows import compiling
from model.huge_pages import collapse
from model.kv_cache import KVCache
from model.kv_layer import Held, LayerCache
from model.lm import MoELanguageModel
from model.rope import RopeTables, rope_tables

_KINDS = 256
"""Of blocks in one model, at most: torch's own limit is 8."""

_ALONE = threading.Lock()
"""What torch is told about guards holds for all threads of the process."""


class WholeCache(LayerCache):
    """A layer's cache with all its slots, those that are empty as well: the same shapes at every token."""

    def __init__(self, layer: LayerCache, length_1: Tensor) -> None:
        super().__init__(*layer.slots)
        self.length = length_1  # type: ignore[assignment]
        self._length_1 = length_1
        self._positions_C = torch.arange(layer.capacity, device=length_1.device)

    def append(self, k_BGSD: Tensor, v_BGSD: Tensor) -> Held:
        """Store the one position that `length` ends with; every slot behind it is later than any query."""
        self._keys.write(self._length_1 - 1, k_BGSD)
        self._values.write(self._length_1 - 1, v_BGSD)
        every = slice(None)
        return Held(self._keys.read(every), self._values.read(every), self._positions_C)


class CompiledStep:
    """Reads one token of every sequence; `cache` may be used without it before and after."""

    def __init__(self, model: MoELanguageModel, cache: KVCache, mask_BS: Tensor | None = None) -> None:
        """Prepare a step behind what `cache` holds. Compilation happens at the first call.

        Args:
            model: whose step it is.
            cache: of its keys and values; full, and big enough for all that will be read.
            mask_BS: 0 at padding among what was read.

        Raises ValueError for what cannot be compiled, see `check_compiled`.
        """
        check_compiled(model.config, cache)
        collapse(model.parameters())
        self._model, self._cache = model, cache
        self._length_1 = torch.tensor([cache.length], device=model.device)
        self._layers = [WholeCache(layer, self._length_1) for layer in cache.layers]  # type: ignore[arg-type]
        self._capacity = capacity = self._layers[0].capacity
        self._valid_BC = None if mask_BS is None else _extended(mask_BS, capacity)
        like = model.model.embed_tokens.weight
        total = cache.total_length(1)
        everywhere = rope_tables(model.config, 0, capacity, like, total_length=total)
        local = rope_tables(model.config, 0, capacity, like, local=True)
        self._ropes = everywhere, everywhere if model.config.rope.local_rope_base is None else local
        self._hooks = [
            hooks
            for module in model.modules()
            for hooks in (module._forward_pre_hooks, module._forward_hooks)
        ]
        self._seen: list[int] | None = None
        """Numbers of the hooks that were there when the step was last compiled or found among programs."""

    @torch.no_grad()
    def __call__(self, ids_B1: Tensor) -> Tensor:
        """Logits of the next token, [B, V]. Raises ValueError where torch cannot compile it."""
        if self._cache.length >= self._capacity:
            raise ValueError(
                f"{self._cache.length + 1} tokens exceed the cache's capacity={self._capacity}; "
                "make the cache with a larger max_length or write less"
            )
        self._length_1 += 1
        hooks = list(chain.from_iterable(self._hooks))
        with _ALONE:
            logits_BV = self._unguarded(ids_B1) if hooks == self._seen else None
            if logits_BV is None:
                with compiling():
                    logits_BV = self._run(ids_B1)
                self._seen = hooks
        for layer in self._cache.layers:
            layer.length += 1
        return logits_BV

    def _unguarded(self, ids_B1: Tensor) -> Tensor | None:
        """The step without asking each module whether it is as it was: a tenth of the time. None if torch must ask."""
        try:
            with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
                return self._run(ids_B1)
        except RuntimeError as error:
            if "skip_guard_eval_unsafe" not in str(error):
                raise
            return None

    def _run(self, ids_B1: Tensor) -> Tensor:
        return _step(self._model, ids_B1, self._length_1 - 1, self._ropes, self._valid_BC, self._layers)


def check_compiled(config: ModelConfig, cache: KVCache | None) -> None:
    """Raise ValueError where a step of this model, or with this cache, has no fixed shapes."""
    if config.attention == "latent":
        raise ValueError(
            "compile=True does not fit attention=latent, whose chunks close at some tokens and not at others; "
            "leave it out"
        )
    if cache is not None and not cache.is_full:
        raise ValueError(
            "compile=True does not fit a cache that forgets, overwrites or lies in files; use a KVCache with "
            "bounded=False, and no eviction or mapped storage"
        )


def _extended(mask_BS: Tensor, capacity: int) -> Tensor:
    """Tokens to come are none of them padding."""
    valid_BC = mask_BS.new_ones(len(mask_BS), capacity, dtype=torch.bool)
    valid_BC[:, : mask_BS.shape[1]] = mask_BS.bool()
    return valid_BC


@torch.compiler.nested_compile_region(max_reuse_entries=_KINDS)
def _block(
    block: nn.Module, hidden_B1D: Tensor, rope: RopeTables, valid_BC: Tensor | None, layer: WholeCache
) -> Tensor:
    output: BlockOutput = block(hidden_B1D, rope, valid_BC, layer)
    return output.hidden_BSD


# What guards have seen need not be measured again: the strides of every weight, at every call.
@partial(torch.compile, dynamic=False, fullgraph=True, options={"size_asserts": False})
def _step(
    model: MoELanguageModel,
    ids_B1: Tensor,
    at_1: Tensor,
    ropes: tuple[RopeTables, RopeTables],
    valid_BC: Tensor | None,
    layers: Sequence[WholeCache],
) -> Tensor:
    decoder = model.model
    hidden_B1D = decoder.embed_tokens(ids_B1)
    if decoder.embed_positions is not None:
        hidden_B1D = hidden_B1D + decoder.embed_positions(at_1)
    everywhere, local = (RopeTables(rope.cos_SD[at_1], rope.sin_SD[at_1]) for rope in ropes)
    for index, (block, layer) in enumerate(zip(decoder.layers, layers, strict=True)):
        rope = local if model.config.reach.is_local(index) else everywhere
        hidden_B1D = _block(block, hidden_B1D, rope, valid_BC, layer)
    logits_BV: Tensor = model.lm_head(decoder.norm(hidden_B1D)).logits_BSV[:, -1]
    return logits_BV
