"""Caches that forget on purpose, so that a model with full attention runs in bounded memory.

`SinksAndRecent` (arXiv:2309.17453) keeps the first tokens and the last ones and gives them the positions of
their places in the cache: text may go on past the trained length. `HeavyHitters` (arXiv:2306.14048) keeps,
for each key head, the positions that queries have read most, and the last ones, at their true positions.
Both give up exactness: what is forgotten is not read again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.kv_layer import Held, LayerCache
from model.kv_slots import Slots


@dataclass(frozen=True, kw_only=True)
class SinksAndRecent:
    """Keep the first `sinks` and the last `recent` positions."""

    sinks: int = 4
    recent: int

    def __post_init__(self) -> None:
        _check(self.sinks, self.recent)

    @property
    def budget(self) -> int:
        """Positions kept at most."""
        return self.sinks + self.recent


@dataclass(frozen=True, kw_only=True)
class HeavyHitters:
    """Keep the last `recent` positions, and of the earlier ones the `heavy` that were read most."""

    heavy: int
    recent: int

    def __post_init__(self) -> None:
        _check(self.heavy, self.recent)

    @property
    def budget(self) -> int:
        """Positions kept at most."""
        return self.heavy + self.recent


Eviction = SinksAndRecent | HeavyHitters


def _check(first: int, recent: int) -> None:
    if first < 0:
        raise ValueError(f"an eviction that keeps {first} early positions is negative; 0 keeps none")
    if recent < 1:
        raise ValueError(f"recent={recent} is below 1; a query reads at least itself")


class EvictingCache(LayerCache):
    """Keeps what a subclass chooses, in order of position, after every attention."""

    def __init__(self, keys: Slots, values: Slots, device: torch.device) -> None:
        super().__init__(keys, values)
        self._device = device
        self._held = 0
        self._fresh: Held | None = None

    @property
    def num_held(self) -> int:
        return self._held

    @property
    def observes(self) -> bool:
        return True

    def append(self, k_BGSD: Tensor, v_BGSD: Tensor) -> Held:
        batch, heads, new = k_BGSD.shape[:3]
        new_S = torch.arange(self.length, self.length + new, device=self._device)
        old = slice(self._held)
        self.length += new
        self._fresh = Held(
            torch.cat((self._keys.read(old), k_BGSD), dim=2),
            torch.cat((self._values.read(old), v_BGSD), dim=2),
            self._positions_with(new_S, batch, heads),
        )
        return self._fresh

    def observe(self, q_BHSD: Tensor, k_BGCD: Tensor, scale: float, visible: Tensor) -> None:
        """Choose what to keep, and write it back."""
        assert self._fresh is not None, "observe follows append"
        fresh, self._fresh = self._fresh, None
        self._held = min(fresh.k_BGCD.shape[2], self.capacity)
        self._keep(fresh, q_BHSD, k_BGCD, scale, visible)

    def truncate(self, length: int) -> None:
        """Only to where it is: ValueError otherwise, for what was forgotten cannot be had back."""
        if length < self.length:
            raise ValueError(
                f"length={length} cannot be restored from a cache that forgets; make one without eviction"
            )

    def _positions_with(self, new_S: Tensor, batch: int, heads: int) -> Tensor:
        """Positions of the kept keys, and `new_S` behind them."""
        raise NotImplementedError

    def _keep(self, fresh: Held, q_BHSD: Tensor, k_BGCD: Tensor, scale: float, visible: Tensor) -> None:
        """Write the `self._held` chosen positions of `fresh` into the first slots."""
        raise NotImplementedError


class StreamingCache(EvictingCache):
    """The first and the last positions; keys are turned by their place when they are read."""

    rotates_late = True

    def __init__(self, keys: Slots, values: Slots, sinks: int, device: torch.device) -> None:
        super().__init__(keys, values, device)
        self._sinks = sinks
        self._positions_C = torch.zeros(0, dtype=torch.int64, device=device)

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + 8 * self.capacity

    def _positions_with(self, new_S: Tensor, batch: int, heads: int) -> Tensor:
        return torch.cat((self._positions_C, new_S))

    def _keep(self, fresh: Held, q_BHSD: Tensor, k_BGCD: Tensor, scale: float, visible: Tensor) -> None:
        assert fresh.positions is not None
        total, every = fresh.k_BGCD.shape[2], torch.arange(fresh.k_BGCD.shape[2], device=self._device)
        kept_C = every[(every < self._sinks) | (every >= total - (self.capacity - self._sinks))]
        self._keys.write(slice(self._held), fresh.k_BGCD[:, :, kept_C])
        self._values.write(slice(self._held), fresh.v_BGCD[:, :, kept_C])
        self._positions_C = fresh.positions[kept_C]


class HeavyHitterCache(EvictingCache):
    """The last positions, and of the rest those with most attention so far; each key head keeps its own."""

    def __init__(self, keys: Slots, values: Slots, recent: int, device: torch.device) -> None:
        super().__init__(keys, values, device)
        self._recent = recent
        self._positions_BGC: Tensor | None = None
        self._mass_BGC: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        if self._mass_BGC is None:
            return super().num_bytes
        batch, heads = self._mass_BGC.shape[:2]
        return super().num_bytes + batch * heads * self.capacity * (8 + 4)

    def _positions_with(self, new_S: Tensor, batch: int, heads: int) -> Tensor:
        new_BGS = new_S.expand(batch, heads, -1)
        return new_BGS if self._positions_BGC is None else torch.cat((self._positions_BGC, new_BGS), dim=-1)

    def _keep(self, fresh: Held, q_BHSD: Tensor, k_BGCD: Tensor, scale: float, visible: Tensor) -> None:
        assert fresh.positions is not None
        positions_BGC = fresh.positions
        mass_BGC = attention_mass(q_BHSD, k_BGCD, scale, visible, positions_BGC.shape[1])
        if self._mass_BGC is not None:
            mass_BGC[..., : self._mass_BGC.shape[-1]] += self._mass_BGC
        recent_BGC = positions_BGC >= self.length - self._recent
        chosen = mass_BGC.masked_fill(recent_BGC, float("inf")).topk(self._held, dim=-1).indices
        chosen = chosen.sort(dim=-1).values
        for slots, x in ((self._keys, fresh.k_BGCD), (self._values, fresh.v_BGCD)):
            picked = x.gather(2, chosen[..., None].expand(-1, -1, -1, x.shape[-1]))
            slots.write(slice(self._held), picked)
        self._positions_BGC = positions_BGC.gather(-1, chosen)
        self._mass_BGC = mass_BGC.gather(-1, chosen)


def attention_mass(q_BHSD: Tensor, k_BGCD: Tensor, scale: float, visible: Tensor, num_heads: int) -> Tensor:
    """Attention that each key received, summed over queries and over the query heads of each of `num_heads`
    heads, float32 [B, num_heads, C].
    """
    k_BHCD = k_BGCD.repeat_interleave(q_BHSD.shape[1] // k_BGCD.shape[1], dim=1)
    scores_BHSC = (q_BHSD.float() @ k_BHCD.float().transpose(-1, -2)) * scale
    weights_BHSC = scores_BHSC.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return weights_BHSC.sum(dim=2).unflatten(1, (num_heads, -1)).sum(dim=2)
