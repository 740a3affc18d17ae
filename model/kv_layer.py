"""The cache of one attention layer: what is kept of the tokens read so far, and what is forgotten.

Grouped attention keeps keys and values; MLA keeps the shared rotated key and the latent in their places, so
every policy here serves both. G counts heads of what is kept (1 in MLA) and D their width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.kv_slots import Slots


class Held(NamedTuple):
    """What a layer reads: earlier positions that are kept, and the new ones."""

    k_BGCD: Tensor
    v_BGCD: Tensor
    positions: Tensor | None
    """Of the keys, int64 [C], or [B, G, C] where each head keeps its own; negative: empty. None: 0 .. C - 1."""


class LayerCache:
    """Keeps everything: slot s holds position s."""

    rotates_late = False
    """Whether keys come in without position, to be turned by their place among the kept ones."""

    def __init__(self, keys: Slots, values: Slots) -> None:
        self._keys, self._values = keys, values
        self.length = 0
        """Tokens read so far."""

    @property
    def slots(self) -> tuple[Slots, Slots]:
        """Where keys and values lie."""
        return self._keys, self._values

    @property
    def capacity(self) -> int:
        return self._keys.capacity

    @property
    def num_held(self) -> int:
        """Positions kept."""
        return self.length

    @property
    def num_bytes(self) -> int:
        """Bytes set aside, however few are used."""
        return self._keys.num_bytes + self._values.num_bytes

    def append(self, k_BGSD: Tensor, v_BGSD: Tensor) -> Held:
        """Store S new positions and return all that may be read."""
        start, stop = self.length, self.length + k_BGSD.shape[2]
        if stop > self.capacity:
            raise ValueError(
                f"{stop} tokens exceed the cache's capacity={self.capacity}; "
                "make the cache with a larger max_length or shorten the prompt"
            )
        self._keys.write(slice(start, stop), k_BGSD)
        self._values.write(slice(start, stop), v_BGSD)
        self.length = stop
        return Held(self._keys.read(slice(stop)), self._values.read(slice(stop)), None)

    def observe(self, q_BHSD: Tensor, k_BGCD: Tensor, scale: float, visible: Tensor) -> None:
        """Called after each attention with what it read; a cache that forgets decides here."""

    @property
    def observes(self) -> bool:
        """Whether `observe` wants to be called."""
        return False

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        self.length = min(self.length, length)


class SlidingCache(LayerCache):
    """Keeps the last `window` positions and the first `sinks`, in a ring: memory does not grow."""

    def __init__(self, keys: Slots, values: Slots, sinks: int, device: torch.device) -> None:
        super().__init__(keys, values)
        self._sinks, self._window = sinks, keys.capacity - sinks
        self._positions_C = torch.full((keys.capacity,), -1, dtype=torch.int64, device=device)

    @property
    def num_held(self) -> int:
        return min(self.length, self.capacity)

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + self._positions_C.untyped_storage().nbytes()

    def append(self, k_BGSD: Tensor, v_BGSD: Tensor) -> Held:
        start, stop = self.length, self.length + k_BGSD.shape[2]
        new_S = torch.arange(start, stop, device=self._positions_C.device)
        self.length = stop
        if stop - start == 1:
            self._store(new_S, k_BGSD, v_BGSD)
            every = slice(None)
            return Held(self._keys.read(every), self._values.read(every), self._positions_C)
        held = Held(k_BGSD, v_BGSD, None)
        if start > 0:
            every = slice(None)
            held = Held(
                torch.cat((self._keys.read(every), k_BGSD), dim=2),
                torch.cat((self._values.read(every), v_BGSD), dim=2),
                torch.cat((self._positions_C, new_S)),
            )
        kept = [s for s in range(stop - start) if start + s < self._sinks or s >= stop - start - self._window]
        self._store(new_S[kept], k_BGSD[:, :, kept], v_BGSD[:, :, kept])
        return held

    def _store(self, positions_S: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> None:
        ring_S = self._sinks + (positions_S - self._sinks) % self._window
        slots_S = torch.where(positions_S < self._sinks, positions_S, ring_S)
        self._keys.write(slots_S, k_BGSD)
        self._values.write(slots_S, v_BGSD)
        self._positions_C[slots_S] = positions_S

    def truncate(self, length: int) -> None:
        """Forget the last positions; ValueError where the ring has overwritten what would be needed then."""
        if length >= self.length:
            return
        if self.length > self.capacity:
            raise ValueError(
                f"length={length} cannot be restored: of {self.length} tokens this cache holds {self.capacity}; "
                "make the cache with bounded=False"
            )
        self._positions_C[self._positions_C >= length] = -1
        self.length = length
