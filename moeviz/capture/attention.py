"""Attention maps from queries and keys, for chosen sequences and heads, averaged in blocks.

The model's own kernel is left alone; what it computed is computed again, exactly, for the few rows that are
shown. Nothing here waits for the device: how far a sequence reaches and how large its blocks are stay
tensors.

Shapes: N chosen sequences, J chosen heads, S queries, C keys, P cells on a side of the map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeviz.capture.reading import AttentionCall

_CHUNK_BYTES = 32e6
"""Rows of the full pattern that exist at a time; a pattern of 8192 x 8192 would be 268 MB per head."""


def choose_heads(num_heads: int, wanted: int) -> tuple[int, ...]:
    """`wanted` heads spread evenly over all."""
    count = min(wanted, num_heads)
    return tuple((2 * index + 1) * num_heads // (2 * count) for index in range(count))


def select(call: AttentionCall, rows_N: Tensor, heads_J: Sequence[int]) -> AttentionCall:
    """The chosen sequences and heads of a call, as detached copies; key heads are repeated to match.

    Heads are plain numbers and rows a tensor: under torch.compile other rows need no other graph.
    """
    groups = call.q_BHSD.shape[1] // call.k_BGCD.shape[1]
    rows_N = rows_N.to(call.q_BHSD.device)
    mask = call.mask
    if mask is not None and mask.shape[0] > 1:
        mask = mask.detach().index_select(0, rows_N)
    if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
        mask = _heads(mask, 1, heads_J)
    return call._replace(
        q_BHSD=_heads(call.q_BHSD.detach(), 1, heads_J).index_select(0, rows_N),
        k_BGCD=_heads(call.k_BGCD.detach(), 1, [head // groups for head in heads_J]).index_select(0, rows_N),
        mask=mask,
        sinks_H=None if call.sinks_H is None else _heads(call.sinks_H.detach(), 0, heads_J),
        heads=tuple(heads_J),
    )


def _heads(values: Tensor, dim: int, heads_J: Sequence[int]) -> Tensor:
    return torch.stack([values.select(dim, head) for head in heads_J], dim)


def pattern(call: AttentionCall, start: int = 0, stop: int | None = None) -> Tensor:
    """Attention weights of queries `start` to `stop`, float32 [N, J, stop - start, C]; without sinks rows sum to 1."""
    q_NJSD = call.q_BHSD[:, :, start:stop].float()
    scores = q_NJSD @ call.k_BGCD.float().transpose(-1, -2) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = _masked(call, scores, start)
    if call.sinks_H is None:
        return scores.softmax(-1)
    sinks = call.sinks_H.float()[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]


def _masked(call: AttentionCall, scores: Tensor, start: int) -> Tensor:
    num_queries, num_keys = call.q_BHSD.shape[2], scores.shape[-1]
    query_S1 = torch.arange(scores.shape[2], device=scores.device)[:, None] + (num_keys - num_queries + start)
    key_C = torch.arange(num_keys, device=scores.device)
    lowest = torch.finfo(scores.dtype).min
    if call.causal:
        scores = scores.masked_fill(key_C > query_S1, lowest)
    if call.window is not None:
        scores = scores.masked_fill(key_C <= query_S1 - call.window, lowest)
    mask = call.mask
    if mask is None:
        return scores
    if mask.dim() == 2:  # over the keys; a padded query still reads itself, so that no row is empty
        return scores.masked_fill(~(mask.bool()[:, None, None, :num_keys] | (key_C == query_S1)), lowest)
    mask = mask[:, :, start : start + scores.shape[2], :num_keys]
    return scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask.float()


def block_maps(call: AttentionCall, valid_NS: Tensor | None, size: int) -> Tensor:
    """Patterns of a selected call, averaged to `size` x `size` at most over each sequence's tokens, [N, J, P, P].

    Args:
        call: what `select` returned.
        valid_NS: False at padding, which is cut out; None: none.
        size: side of the map at most. Shorter sequences keep every query and key.
    """
    num_seqs, num_heads, num_queries = call.q_BHSD.shape[:3]
    num_keys = call.k_BGCD.shape[2]
    step = max(1, int(_CHUNK_BYTES / (4 * num_seqs * num_heads * num_keys)))
    if valid_NS is None and max(num_queries, num_keys) <= size:  # as many cells as tokens: nothing to average
        parts = [pattern(call, start, start + step) for start in range(0, num_queries, step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    rows = averaging(_valid(valid_NS, num_seqs, num_queries, call.q_BHSD.device), size)
    columns = averaging(_valid(valid_NS, num_seqs, num_keys, call.q_BHSD.device), size)
    maps = rows.new_zeros(num_seqs, num_heads, rows.shape[1], columns.shape[1])
    for start in range(0, num_queries, step):
        narrow = pattern(call, start, start + step) @ columns[:, None].transpose(-1, -2)
        maps += rows[:, None, :, start : start + step] @ narrow
    return maps


def averaging(valid_NS: Tensor, size: int) -> Tensor:
    """The matrices [N, P, S] that average the valid ones of S positions in the smallest blocks with P <= `size`."""
    length_N1 = valid_NS.sum(-1, keepdim=True)
    block_N1 = (length_N1 + size - 1).div(size, rounding_mode="floor").clamp(min=1)
    cell_NS = (valid_NS.cumsum(-1) - 1).div(block_N1, rounding_mode="floor")
    cells_P1 = torch.arange(min(size, valid_NS.shape[1]), device=valid_NS.device)[:, None]
    member_NPS = ((cell_NS[:, None, :] == cells_P1) & valid_NS[:, None, :]).float()
    return member_NPS / member_NPS.sum(-1, keepdim=True).clamp(min=1)


def _valid(valid_NS: Tensor | None, num_seqs: int, length: int, device: torch.device) -> Tensor:
    if valid_NS is not None and valid_NS.shape[1] == length:
        return valid_NS.to(device)
    return torch.ones(num_seqs, length, dtype=torch.bool, device=device)
