"""Multi-token prediction: modules behind the model that predict tokens further ahead, an auxiliary training loss.

DeepSeek-V3's sequential form (arXiv:2412.19437, section 2.2). Module k joins what was known at position i with the
embedding of token i + k and predicts token i + k + 1, so every prediction keeps its whole causal chain; embedding
and output matrix are the model's own. They train the model; when it generates they can draft (`model.speculative`).

A module's block has the model's attention and a dense feed-forward layer, as wide as the experts that one token
uses: it has no router, so every routing count and loss speaks of the model alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.block import Block
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.linear import Linear
from model.masks import Reach, visible_in_documents
from model.norm import build_norm
from model.recompute import run_block
from model.rope import rope_tables

_IGNORE = -100


class _Further(NamedTuple):
    """What module k works on: one of its positions i stands for the tokens i, i + k and i + k + 1."""

    ahead_BS: Tensor
    """Token i + k."""
    labels_BS: Tensor
    """Token i + k + 1; -100 where it is not asked for."""
    valid_BS: Tensor | None
    documents_BS: Tensor | None


class MTPModule(nn.Module):
    """One step further: h' = norm(Block(W [norm(embedding); norm(h)])). Names are those of DeepSeek's checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.enorm = build_norm(config)
        self.hnorm = build_norm(config)
        self.eh_proj = Linear(2 * config.dim, config.dim, bias=False)
        dense = replace(config, first_dense_layers=config.num_layers, dense_layers=())
        self.block = Block(dense, config.num_layers - 1)
        self.norm = build_norm(config)
        self.recompute = False
        """Whether training recomputes the block in backward to save its activations."""

    def forward(
        self,
        hidden_BSD: Tensor,
        embedded_BSD: Tensor,
        valid_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """[B, S, D], normalised: what the output matrix reads, and the module behind this one.

        Args:
            hidden_BSD: the same of the model, or of the module before.
            embedded_BSD: the further tokens.
            valid_BS: False at padding; with a cache it covers the cached positions as well.
            documents_BS: positions of one number, side by side, read each other only.
            cache: of this module's one block, to which these positions are added.
        """
        joined_BSD = self.eh_proj(torch.cat((self.enorm(embedded_BSD), self.hnorm(hidden_BSD)), dim=-1))
        reach, last = self.config.reach, self.config.num_layers - 1
        new = joined_BSD.shape[1]
        start, length = (0, new) if cache is None else cache.rope_range(new)
        rope = rope_tables(self.config, start, length, joined_BSD, local=reach.is_local(last))
        mask = None
        if documents_BS is not None:
            mask = visible_in_documents(Reach.of(reach, last), documents_BS, valid_BS)
        held = None if cache is None else cache.layers[0]
        output = run_block(self.block, self.recompute, joined_BSD, rope, valid_BS, held, None, mask)
        return self.norm(output.hidden_BSD)


class MultiTokenPrediction(nn.ModuleList):
    """The modules for depths 1 .. D, one behind the other."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(MTPModule(config) for _ in range(config.heads.mtp_depth))
        self.config = config

    def caches(self, batch_size: int, max_length: int, like: Tensor) -> list[KVCache]:
        """An empty cache for each module, on the device and in the dtype of `like`, that can go back."""
        one = replace(self.config, num_layers=1, first_dense_layers=1, dense_layers=())
        size: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "bounded": False}
        return [KVCache(one, **size, device=like.device, dtype=like.dtype) for _ in self]

    def losses(
        self,
        hidden_BSD: Tensor,
        input_ids_BS: Tensor,
        labels_BS: Tensor,
        *,
        embed: Callable[[Tensor], Tensor],
        cross_entropy: Callable[[Tensor, Tensor], Tensor],
        valid_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy of each depth, nats, [D]; 0 where nothing is asked that far ahead.

        Depth k leaves out the last k positions, positions whose label k places on is -100, and pairs i, i + k of
        which one is padding or that a document's end divides: each document counts as if it stood alone.

        Args:
            hidden_BSD: what the model's output matrix reads.
            labels_BS: the token that follows each position, as for the model itself.
            embed: token ids -> vectors.
            cross_entropy: (hidden, labels) -> scalar mean over labels that are not -100.
        """
        losses = []
        for depth, module in enumerate(self, start=1):
            if depth >= input_ids_BS.shape[1]:
                losses.append(hidden_BSD.new_zeros(()))
                continue
            further = _shift(depth, input_ids_BS, labels_BS, valid_BS, documents_BS)
            hidden_BSD = module(
                hidden_BSD[:, :-1], embed(further.ahead_BS), further.valid_BS, further.documents_BS
            )
            losses.append(cross_entropy(hidden_BSD, further.labels_BS))
        return torch.stack(losses)


def _shift(
    depth: int, input_ids_BS: Tensor, labels_BS: Tensor, valid_BS: Tensor | None, documents_BS: Tensor | None
) -> _Further:
    labels = labels_BS[:, depth:]
    valid = documents = None
    if valid_BS is not None:
        valid = valid_BS[:, :-depth] & valid_BS[:, depth:]
        labels = labels.masked_fill(~valid, _IGNORE)
    if documents_BS is not None:
        documents = documents_BS[:, :-depth]
        labels = labels.masked_fill(documents != documents_BS[:, depth:], _IGNORE)
    return _Further(input_ids_BS[:, depth:], labels, valid, documents)
