"""Keys and values of the tokens read so far: generating a token then costs one position, not all of them.

A `KVCache` holds one cache for each block, of the kind its attention needs: everything, the window of a
local layer, MLA's latents, or the state of two-stage latent attention. How many bytes that takes is
known beforehand: `cache_bytes`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from model.config import ModelConfig
from model.kv_eviction import EvictingCache, Eviction, HeavyHitterCache, SinksAndRecent, StreamingCache
from model.kv_latents import LatentCache
from model.kv_layer import LayerCache, SlidingCache
from model.kv_slots import Slots, Storage, make_slots

_POSITION_BYTES = 8
_MASS_BYTES = 4
_SCALE_BYTES = 4


class KVCache:
    """One layer cache per block, all of the same length."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        storage: Storage = "dense",
        folder: Path | None = None,
        eviction: Eviction | None = None,
        bounded: bool = True,
    ) -> None:
        """An empty cache.

        Args:
            config: the model.
            batch_size: sequences.
            max_length: tokens it has room for. None: config.max_seq_len. With an eviction only a plan: what
                dynamic RoPE is stretched for.
            device: where it lies.
            dtype: of what it returns.
            storage: dense (as it comes), int8 (a byte a number), or mapped (files in `folder`, CPU).
            folder: of mapped files; one for each layer and side, overwritten.
            eviction: forget positions once there are more than its budget. None: keep all.
            bounded: whether local layers keep their window only. False: everything, so that `truncate` may go
                back any distance.

        Raises ValueError where these do not fit the model or each other.
        """
        _check(config, storage, folder, eviction)
        if storage == "mapped" and torch.device(device or "cpu").type != "cpu":
            raise ValueError(
                f"storage=mapped does not fit device={device}; files are mapped for the CPU only"
            )
        self._config, self.batch_size = config, batch_size
        self.max_length = max_length or config.max_seq_len
        self._device = torch.device(device or "cpu")
        self._dtype = dtype or torch.get_default_dtype()
        self._storage, self._folder = storage, folder
        self._eviction = eviction
        self.layers: list[LayerCache | LatentCache] = [
            self._layer(layer, bounded) for layer in range(config.num_layers)
        ]

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.layers[0].length

    @property
    def forgets(self) -> bool:
        """Whether text may go on without end: early positions are forgotten."""
        return self._eviction is not None

    @property
    def goes_back(self) -> bool:
        """Whether `truncate` may: nothing was overwritten. Two-stage latents go back inside an open chunk only."""
        return not any(isinstance(layer, SlidingCache | EvictingCache) for layer in self.layers)

    @property
    def is_full(self) -> bool:
        """Whether every layer keeps everything, position s in slot s, in memory."""
        return self._storage != "mapped" and all(type(layer) is LayerCache for layer in self.layers)

    @property
    def prefill_chunk(self) -> int:
        """Tokens to read at once at most: with what is kept they fill the trained context."""
        if self._eviction is None:
            return self.max_length
        return max(1, self._config.max_seq_len - self._eviction.budget)

    @property
    def num_bytes(self) -> int:
        """Bytes set aside, measured on the buffers."""
        return sum(layer.num_bytes for layer in self.layers)

    def truncate(self, length: int) -> None:
        """Go back to the first `length` tokens, to read another continuation."""
        for layer in self.layers:
            layer.truncate(length)

    def rope_range(self, num_new: int) -> tuple[int, int]:
        """First position and number of positions whose angles `num_new` further tokens need."""
        first = self.layers[0]
        if isinstance(first, LatentCache):
            return self.length - first.num_open, first.num_open + num_new
        if first.rotates_late:
            return 0, first.num_held + num_new
        return self.length, num_new

    def total_length(self, num_new: int) -> int:
        """Tokens that dynamic RoPE must reach: all there will be, or those kept where keys turn when read."""
        start, length = self.rope_range(num_new)
        return start + length if self.layers[0].rotates_late else self.max_length

    def _layer(self, layer: int, bounded: bool) -> LayerCache | LatentCache:
        config, device = self._config, self._device
        if config.attention == "latent":
            shape = (self.batch_size, config.kv_heads, config.latents.latent_chunk, config.head_width)
            return LatentCache(shape, config.latents.num_latents, device, self._dtype)
        slots = _num_slots(config, layer, self.max_length, self._eviction, bounded)
        keys, values = self._slots(layer, slots)
        eviction = self._eviction
        if isinstance(eviction, SinksAndRecent):
            return StreamingCache(keys, values, eviction.sinks, device)
        if eviction is not None:
            return HeavyHitterCache(keys, values, eviction.recent, device)
        if slots < self.max_length:
            return SlidingCache(keys, values, config.reach.sink_tokens, device)
        return LayerCache(keys, values)

    def _slots(self, layer: int, slots: int) -> tuple[Slots, Slots]:
        heads, *widths = _kept_shape(self._config)
        made = []
        for side, width in zip(("keys", "values"), widths, strict=True):
            path = self._folder / f"layer-{layer}-{side}" if self._folder is not None else None
            shape = (self.batch_size, heads, slots, width)
            made.append(make_slots(self._storage, shape, self._device, self._dtype, path))
        return made[0], made[1]


def _check(config: ModelConfig, storage: Storage, folder: Path | None, eviction: Eviction | None) -> None:
    if (storage == "mapped") != (folder is not None):
        raise ValueError(
            f"storage={storage} with folder={folder}; mapped storage needs a folder, and no other does"
        )
    if config.attention == "latent" and (storage != "dense" or eviction is not None):
        raise ValueError(
            f"storage={storage}, eviction={eviction} do not fit attention=latent, whose cache has a constant "
            "size; leave them out"
        )
    if eviction is not None and config.block.positions == "learned":
        raise ValueError(
            f"eviction={eviction} does not fit positions=learned, which end at max_seq_len; use rotary positions"
        )
    if eviction is not None and (config.reach.window is not None or config.reach.sparsity != "none"):
        raise ValueError(
            f"eviction={eviction} does not fit a model with a window or a pattern, which forgets by itself; "
            "leave it out"
        )


def _kept_shape(config: ModelConfig) -> tuple[int, int, int]:
    """Heads, and the widths of what is kept as key and as value."""
    if config.attention == "mla":
        return 1, config.mla.qk_rope_head_dim, config.mla.kv_lora_rank
    return config.kv_heads, config.head_width, config.head_width


def _num_slots(
    config: ModelConfig, layer: int, max_length: int, eviction: Eviction | None, bounded: bool
) -> int:
    """Positions that layer `layer` has room for."""
    if eviction is not None:
        return eviction.budget
    reach = config.reach
    # A pattern reads positions that a ring would have overwritten only within its window, so a ring is exact.
    if bounded and reach.window is not None and reach.is_local(layer):
        return min(max_length, reach.sink_tokens + reach.window)
    return max_length


def cache_bytes(
    config: ModelConfig,
    *,
    batch_size: int,
    max_length: int | None = None,
    element_bytes: int = 4,
    storage: Storage = "dense",
    eviction: Eviction | None = None,
    bounded: bool = True,
) -> int:
    """Bytes that a `KVCache` with these arguments takes; a closed form, the buffers are not asked.

    For each layer and sequence: slots * heads * (key width + value width) * bytes of a number, where int8
    adds a float32 scale for each key and each value, rings and evictions 8 bytes for each position, heavy
    hitters 12 for each position of a head. Two-stage latents: G * (2 * chunk * D + M * (2 * D + 1)) numbers,
    at any length; those of the latents are float32.
    """
    length = max_length or config.max_seq_len
    if config.attention == "latent":
        open_numbers = 2 * config.latents.latent_chunk * config.head_width
        state_numbers = config.latents.num_latents * (2 * config.head_width + 1)
        each = config.kv_heads * (open_numbers * element_bytes + state_numbers * 4)
        return config.num_layers * batch_size * each
    heads, k_width, v_width = _kept_shape(config)
    vector = (k_width + v_width) * element_bytes
    if storage == "int8":
        vector = k_width + v_width + 2 * _SCALE_BYTES
    total = 0
    for layer in range(config.num_layers):
        slots = _num_slots(config, layer, length, eviction, bounded)
        total += batch_size * heads * slots * vector
        if isinstance(eviction, SinksAndRecent) or (eviction is None and slots < length):
            total += slots * _POSITION_BYTES
        elif eviction is not None:
            total += batch_size * heads * slots * (_POSITION_BYTES + _MASS_BYTES)
    return total
