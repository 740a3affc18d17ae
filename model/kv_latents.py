"""The cache of two-stage latent attention: what the latents have read, and the tokens of the open chunk.

Its size does not depend on how much was read: at the end of a chunk its tokens go into the latents and are
forgotten.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.kv_slots import DenseSlots


class LatentState(NamedTuple):
    """What M latents of each key head have read: weighted means of keys and values, and the weights' sum."""

    k_BGMD: Tensor
    v_BGMD: Tensor
    lse_BGM: Tensor
    """Logarithm of the sum of exp(score) over all tokens read; very negative before the first."""


NOTHING_READ = -1e30
"""`lse` of a latent that has read nothing: finite, so that differences of two of them are numbers."""


class LatentCache:
    """The state before the open chunk, and keys (without position) and values of the open chunk."""

    rotates_late = True

    def __init__(
        self, shape: tuple[int, int, int, int], num_latents: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """`shape` is (sequences, key heads, positions of a chunk, width of a head)."""
        batch, heads, self._chunk, width = shape
        self._keys = DenseSlots(torch.zeros(shape, device=device, dtype=dtype))
        self._values = DenseSlots(torch.zeros(shape, device=device, dtype=dtype))
        read = (batch, heads, num_latents)
        self.state = LatentState(
            torch.zeros(*read, width, device=device),
            torch.zeros(*read, width, device=device),
            torch.full(read, NOTHING_READ, device=device),
        )
        self.length = 0
        """Tokens read so far."""

    @property
    def num_open(self) -> int:
        """Tokens of the open chunk."""
        return self.length % self._chunk

    @property
    def num_bytes(self) -> int:
        """Bytes set aside."""
        state = sum(x.untyped_storage().nbytes() for x in self.state)
        return self._keys.num_bytes + self._values.num_bytes + state

    def append(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values from the start of the open chunk on, the S new ones last; `close` must follow."""
        kept = slice(self.num_open)
        self.length += k_BGSD.shape[2]
        if kept.stop == 0:
            return k_BGSD, v_BGSD
        return (
            torch.cat((self._keys.read(kept), k_BGSD), dim=2),
            torch.cat((self._values.read(kept), v_BGSD), dim=2),
        )

    def close(self, k_BGCD: Tensor, v_BGCD: Tensor, state: LatentState) -> None:
        """Keep the open end of what `append` returned, and the state before it."""
        kept = slice(self.num_open)
        first = k_BGCD.shape[2] - self.num_open
        self._keys.write(kept, k_BGCD[:, :, first:])
        self._values.write(kept, v_BGCD[:, :, first:])
        self.state = LatentState(
            *(new.to(old.dtype).clone() for new, old in zip(state, self.state, strict=True))
        )

    def truncate(self, length: int) -> None:
        """Forget the last tokens of the open chunk; ValueError beyond, for latents do not give back."""
        if length < self.length - self.num_open:
            raise ValueError(
                f"length={length} lies in a closed chunk, and latents cannot forget; go back to "
                f"{self.length - self.num_open} at most, or read the text again"
            )
        self.length = min(self.length, length)
