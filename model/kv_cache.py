"""Keys and values of the tokens read so far: generating a token then costs one position, not all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig


class LayerCache:
    """The cache of one attention layer: two buffers [B, G, capacity, D] filled from the left.

    G counts key and value heads, D is the width of one head.
    """

    def __init__(self, k_BGCD: Tensor, v_BGCD: Tensor) -> None:
        self._k_BGCD, self._v_BGCD = k_BGCD, v_BGCD
        self.length = 0

    @property
    def capacity(self) -> int:
        return self._k_BGCD.shape[2]

    def append(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """Store S new positions and return the keys and values of all positions so far."""
        start, stop = self.length, self.length + k_BGSD.shape[2]
        if stop > self.capacity:
            raise ValueError(
                f"{stop} tokens exceed the cache's capacity={self.capacity}; "
                "make the cache with a larger max_length or shorten the prompt"
            )
        self._k_BGCD[:, :, start:stop] = k_BGSD
        self._v_BGCD[:, :, start:stop] = v_BGSD
        self.length = stop
        return self._k_BGCD[:, :, :stop], self._v_BGCD[:, :, :stop]

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        self.length = min(self.length, length)


class KVCache:
    """One `LayerCache` per block, all of the same length."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Room for `max_length` tokens (None: config.max_seq_len) of `batch_size` sequences."""
        shape = (batch_size, config.kv_heads, max_length or config.max_seq_len, config.head_width)

        def buffer() -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        self.layers = [LayerCache(buffer(), buffer()) for _ in range(config.num_layers)]

    @property
    def length(self) -> int:
        """Positions held."""
        return self.layers[0].length

    def truncate(self, length: int) -> None:
        """Go back to the first `length` positions, to read another continuation."""
        for layer in self.layers:
            layer.truncate(length)
