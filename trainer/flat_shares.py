"""Whole matrices out of ZeRO's flat shares, for an optimizer that needs them whole.

ZeRO strings the weights of a group together and cuts the string into one share for each rank, wherever the cut falls
(stages 1 and 2), or cuts every weight by itself (stage 3). Either way a matrix is a list of fragments, each in
somebody's share. A rank completes those of which it holds a part, so what is done to matrices is divided among ranks
as their state is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist


class Fragment(NamedTuple):
    """Consecutive elements of a matrix, or of a stack of them."""

    rank: int
    """Whose share they are in."""
    start: int
    """Where they begin in that share."""
    numel: int


class Divided(NamedTuple):
    """A weight in fragments, in the order of its elements."""

    shape: torch.Size
    fragments: tuple[Fragment, ...]


class FlatShare:
    """One rank's share of a group of weights."""

    def __init__(self, weights: Sequence[Divided], group: dist.ProcessGroup | None) -> None:
        """
        Args:
            weights: every weight of the group, those of other ranks too.
            group: the ranks that share it, which numbers fragments.
        """
        self._weights, self._group = weights, group
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)

    def completed(self, share: Tensor) -> Iterator[tuple[Tensor, slice, slice]]:
        """The weights of which a part is here. Every rank of the group must call it.

        Args:
            share: values of this rank, flat.

        Yields:
            A whole weight, where in `share` the part of it is that is here, and which of its elements that part has.
        """
        shares = self._gathered(share)
        for shape, fragments in self._weights:
            begins = accumulate((fragment.numel for fragment in fragments), initial=0)
            for fragment, begin in zip(fragments, begins, strict=False):
                if fragment.rank == self._rank and fragment.numel:
                    parts = [shares[rank][start : start + numel] for rank, start, numel in fragments]
                    here = slice(fragment.start, fragment.start + fragment.numel)
                    yield torch.cat(parts).view(shape), here, slice(begin, begin + fragment.numel)

    def _gathered(self, share: Tensor) -> list[Tensor]:
        if self._ranks == 1:
            return [share]
        shares = [torch.empty_like(share) for _ in range(self._ranks)]
        dist.all_gather(shares, share, group=self._group)
        return shares


def flat_shares(zero: Any, stage: int) -> dict[int, FlatShare]:
    """The shares of DeepSpeed's ZeRO optimizer, by `id` of the flat tensors that the optimizer below it steps.

    Args:
        zero: `engine.optimizer`.
        stage: of ZeRO, 1 to 3.
    """
    return dict(_cut_by_weight(zero) if stage == 3 else _cut_through(zero))


def _cut_through(zero: Any) -> Iterator[tuple[int, FlatShare]]:
    """Stages 1 and 2: one string of all weights, in equal pieces."""
    for index, flat in enumerate(zero.single_partition_of_fp32_groups):
        placed = zip(zero.round_robin_bit16_groups[index], zero.round_robin_bit16_offsets[index], strict=True)
        weights = [
            Divided(weight.shape, tuple(_fragments(offset, weight.numel(), flat.numel())))
            for weight, offset in placed
        ]
        yield id(flat), FlatShare(weights, zero.real_dp_process_group[index])


def _fragments(offset: int, numel: int, size: int) -> Iterator[Fragment]:
    """What elements `offset` .. `offset + numel` of a string are in its pieces of `size`."""
    end = offset + numel
    while offset < end:
        rank, start = divmod(offset, size)
        here = min(size - start, end - offset)
        yield Fragment(rank, start, here)
        offset += here


def _cut_by_weight(zero: Any) -> Iterator[tuple[int, FlatShare]]:
    """Stage 3: of each weight one piece on each rank, the last ones filled up."""
    for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
        ranks = zero.sub_group_partition_counts[index]
        weights, start = [], 0
        for weight in zero.fp16_groups[index]:
            piece = weight.partition_numel()
            held = [min(piece, max(weight.ds_numel - rank * piece, 0)) for rank in range(ranks)]
            weights.append(
                Divided(weight.ds_shape, tuple(Fragment(rank, start, n) for rank, n in enumerate(held)))
            )
            start += piece
        yield id(flat), FlatShare(weights, zero.sub_group_process_groups[index])
