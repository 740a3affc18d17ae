"""Which earlier positions a query may read, as one function of two positions.

The same function fills a mask for the eager and the fused core, decides blocks for FlexAttention, and lets a
viewer rebuild the pattern. Positions are integers; a negative key position is an empty slot of a cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention_config import ReachConfig, Sparsity


@dataclass(frozen=True, kw_only=True)
class Reach:
    """`reach(query, key)` is True where the query may read the key."""

    window: int | None = None
    """Last positions that are visible, the query's own included. None: all."""
    sink_tokens: int = 0
    """First positions that are visible whatever window and pattern say."""
    sparsity: Sparsity = "none"
    block: int = 1
    """Stride of the pattern."""

    @classmethod
    def of(cls, config: ReachConfig, layer: int) -> Reach:
        """What layer `layer` (0-based) may read; global layers have no window."""
        window = config.window if config.is_local(layer) else None
        sinks = config.sink_tokens
        return cls(window=window, sink_tokens=sinks, sparsity=config.sparsity, block=config.sparse_block)

    @property
    def plain(self) -> bool:
        """Whether this is causal attention and nothing else."""
        return self.window is None and self.sparsity == "none"

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Bool, of the shape the two positions broadcast to."""
        visible = self._near(query, key)
        if self.sink_tokens and not self.plain:
            visible = visible | (key < self.sink_tokens)
        return visible & (key <= query) & (key >= 0)

    def _near(self, query: Tensor, key: Tensor) -> Tensor:
        visible = self._pattern(query, key)
        return visible if self.window is None else visible & (key > query - self.window)

    def _pattern(self, query: Tensor, key: Tensor) -> Tensor:
        if self.sparsity == "strided":  # what is near, and every stride-th position before it
            return (query - key < self.block) | ((query - key) % self.block == 0)
        if self.sparsity == "fixed":  # the own block, and the last position of every earlier one
            return (query // self.block == key // self.block) | (key % self.block == self.block - 1)
        if self.sparsity == "blocks":  # the own block and the one before it
            return query // self.block - key // self.block <= 1
        return key <= query


def visible_keys(
    reach: Reach, num_queries: int, num_keys: int, valid_BC: Tensor | None, device: torch.device
) -> Tensor:
    """Which keys each query may read: bool [1, 1, S, C], or [B, 1, S, C] where padding differs.

    Query s stands at position C - S + s. It always reads its own position, also where that is padding: a row
    without any key would be 0/0.
    """
    query_S1 = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key_C = torch.arange(num_keys, device=device)
    visible = reach(query_S1, key_C)[None, None]
    if valid_BC is None:
        return visible
    return visible & (valid_BC[:, None, None, :] | (key_C == query_S1))


def visible_slots(
    reach: Reach, num_queries: int, length: int | Tensor, positions: Tensor, valid_BC: Tensor | None
) -> Tensor:
    """`visible_keys` for a cache that forgets: bool [B or 1, G or 1, S, C].

    Args:
        reach: the rule.
        num_queries: S, the last of the tokens read so far.
        length: tokens read so far.
        positions: of the keys held, [C], or [B, G, C] where each head keeps its own; negative: empty.
        valid_BC: False at padding, over all tokens read so far.
    """
    query_S1 = (torch.arange(-num_queries, 0, device=positions.device) + length)[:, None]
    key = positions[None, None, None] if positions.dim() == 1 else positions[:, :, None]
    visible = reach(query_S1, key)
    if valid_BC is None:
        return visible
    slots = positions.clamp_min(0)
    if positions.dim() == 1:
        valid = valid_BC[:, slots][:, None, None]
    else:
        valid = valid_BC[:, None].expand(-1, slots.shape[1], -1).gather(-1, slots)[:, :, None]
    return visible & (valid | (key == query_S1))


def document_numbers(input_ids_BS: Tensor, end_id: int) -> Tensor:
    """int64 [B, S]: how many documents ended before each position; `end_id` belongs to the one it ends."""
    ends_BS = (input_ids_BS == end_id).long()
    return ends_BS.cumsum(dim=1) - ends_BS


def visible_in_documents(reach: Reach, documents_BS: Tensor, valid_BS: Tensor | None = None) -> Tensor:
    """Which keys each query may read where a sequence holds several documents: bool [B, 1, S, S].

    A query reads its own document only, and distances, sinks and patterns count from that document's first
    token: so each is read as if it stood alone. As in `visible_keys`, a query always reads itself.

    Args:
        reach: the rule inside a document.
        documents_BS: the document of each position, in runs: one number never comes again after another.
        valid_BS: False at padding.
    """
    place_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    inside_BS = place_S - torch.where(begins_BS, place_S, 0).cummax(dim=1).values
    visible = reach(inside_BS[:, :, None], inside_BS[:, None, :])
    visible = visible & (documents_BS[:, :, None] == documents_BS[:, None, :])
    if valid_BS is not None:
        visible = visible & (valid_BS[:, None, :] | (place_S == place_S[:, None]))
    return visible[:, None]
