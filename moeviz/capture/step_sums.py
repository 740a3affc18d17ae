"""What the routers of one step did, as far as it was summed, and what still waits to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from moeviz.capture.bias import CopiedBias
from moeviz.capture.reading import Reading
from moeviz.capture.reduce import RoutingSums


class Held(Protocol):
    """Memory that counts as free again when this object goes."""

    size: float
    """Bytes."""


class RoutingPiece(NamedTuple):
    """Token-level decisions of the chosen sequences of one micro-batch, for some layers."""

    layers: tuple[int, ...]
    micro_batch: int
    experts_LNSK: Tensor
    """int16: the bits of uint16, which torch can hardly compute with."""
    weights_LNSK: Tensor


@dataclass(eq=False)
class Pile:
    """Readings of neighbouring layers of one micro-batch that are still to be summed, and what that takes."""

    index: int
    """Of the layer group."""
    first: int
    """Place of the first layer in its group."""
    readings: Sequence[Reading]
    bias: CopiedBias | None
    valid_T: Tensor | None
    versions: tuple[int, ...]
    """Of their tensors, when they were read."""
    held: Held
    """Stands for the memory that the readings hold, which counts as free again when it goes."""


@dataclass(eq=False, slots=True)
class StepSums:
    """What the routers of one step did so far."""

    sums: dict[int, RoutingSums] = field(default_factory=dict)
    """By index of the layer group."""
    piles: list[Pile] = field(default_factory=list)
    """What is not in `sums` yet."""
    waiting_bytes: float = 0
    """Memory that `piles` held at first."""
    failure: Exception | None = None
    """Why something that waited never came into `sums`."""
    routing: list[RoutingPiece] = field(default_factory=list)
    tokens: int = 0
    """Tokens of micro-batches without padding mask."""
    valid_tokens: Tensor | None = None
    """Valid tokens of those with one, a scalar on the device."""
    layers_seen: set[int] = field(default_factory=set)
    dropless: bool = True

    def add(self, index: int, num_layers: int, first: int, sums: RoutingSums) -> None:
        """Add the sums of some neighbouring layers of a group of `num_layers`."""
        total, stop = self.sums.get(index), first + len(sums.counts_LE)
        if total is None and stop - first == num_layers:
            self.sums[index] = sums
            return
        if total is None:
            width = sums.counts_LE.shape[1]
            total = RoutingSums(
                counts_LE=sums.counts_LE.new_zeros(num_layers, width),
                dropped_LE=sums.dropped_LE.new_zeros(num_layers, width),
                prob_sum_LE=sums.prob_sum_LE.new_zeros(num_layers, width),
                weight_sum_LE=sums.weight_sum_LE.new_zeros(num_layers, width),
                token_sums_NL=sums.token_sums_NL.new_zeros(sums.token_sums_NL.shape[0], num_layers),
            )
            self.sums[index] = total
        for mine, more in zip(total[:-1], sums[:-1], strict=True):
            mine[first:stop] += more
        total.token_sums_NL[:, first:stop] += sums.token_sums_NL
