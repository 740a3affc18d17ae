"""Between device and host without waiting: copies start at once, and whoever needs the numbers waits for them.

On CUDA the training thread only queues copies and one event; the writer thread waits for the event. On the
CPU the tensors are handed over as they are, so they must not be written to afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


class HostCopy:
    """Copies of named tensors on their way to the host."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Start the copies of `tensors` (detached, and not changed any more)."""
        self._host = {name: _start(tensor) for name, tensor in tensors.items()}
        self._events: list[torch.cuda.Event] = []
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream(device))
            self._events.append(event)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._host.values())

    def arrays(self) -> dict[str, np.ndarray]:
        """Wait for the copies and give them out."""
        for event in self._events:
            event.synchronize()
        return {name: tensor.numpy() for name, tensor in self._host.items()}


def index_tensor(indices: Sequence[int], device: torch.device | None) -> Tensor:
    """Indices as an int64 tensor on `device`; a plain torch.tensor(..., device) would wait for CUDA."""
    if device is None or device.type != "cuda":
        return torch.tensor(indices, device=device)
    return torch.tensor(indices).pin_memory().to(device, non_blocking=True)


def _start(tensor: Tensor) -> Tensor:
    if tensor.is_cuda:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)
    return tensor if tensor.is_cpu else tensor.cpu()
