"""Copies of selection biases, taken in the step: a few numbers, for which every call of torch or NumPy is too much.

Between training's own operations the caches are cold: to stack four tensors took 36 microseconds there, twice a step,
against 3 in a loop. So the bytes are joined, and become numbers in the writer's thread.

Shapes: L routers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_PLACES = 256
"""Biases whose place in memory is remembered, at most."""
_STORAGE_BYTES = 2**16
"""Memory that a place keeps from being freed, at most: a bias may be a part of something large."""


class CopiedBias(NamedTuple):
    """Selection biases of some routers as they were."""

    numbers: Tensor | bytes
    """Float32 [L, E], or its bytes."""
    num_experts: int

    def tensor(self) -> Tensor:
        """Float32 [L, E], on the device of the routers."""
        if isinstance(self.numbers, Tensor):
            return self.numbers
        table_LE = np.frombuffer(self.numbers, np.float32).reshape(-1, self.num_experts)
        return torch.from_numpy(table_LE.copy())  # torch wants memory that may be written to


class BiasCopier:
    """Copies biases of E experts each."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._places: dict[int, memoryview] = {}
        """Memory of biases on a CPU by its address. As it is held here, no other tensor comes to lie there."""

    def copy(self, biases: Sequence[Tensor]) -> CopiedBias:
        """Biases [E] of L routers, at least one."""
        try:
            numbers = b"".join([self._places[bias_E.data_ptr()] for bias_E in biases])
        except KeyError:
            for bias_E in biases:
                self._remember(bias_E.detach())
            return CopiedBias(torch.stack([bias_E.detach() for bias_E in biases]).float(), self._num_experts)
        return CopiedBias(numbers, self._num_experts)

    def _remember(self, bias_E: Tensor) -> None:
        if not (bias_E.is_cpu and bias_E.dtype == torch.float32 and bias_E.is_contiguous()):
            return
        if bias_E.untyped_storage().nbytes() > _STORAGE_BYTES:
            return
        if len(self._places) >= _PLACES:  # of a model that puts them elsewhere each time
            self._places.clear()
        self._places[bias_E.data_ptr()] = bias_E.numpy().data
