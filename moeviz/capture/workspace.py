"""Memory that is used again in every step, on a CPU: fresh pages cost more than the arithmetic done in them.

An accelerator's own allocator keeps memory already; there a table is new each time, and nothing is held between
steps.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class Workspace:
    """Tables by name. A table is overwritten by the next request for its name."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def table(
        self, name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Memory of that shape, not initialised."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        size, memory = prod(shape), self._memory.get(name)
        if memory is None or memory.numel() < size:
            # Memory made under inference_mode could not be written to outside of it.
            with torch.inference_mode(False):
                memory = self._memory[name] = torch.empty(size, dtype=dtype)
        return memory[:size].view(shape)
